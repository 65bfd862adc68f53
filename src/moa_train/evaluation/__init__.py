"""Tables: pure metrics, the protocol that makes the pictures they need, and the report."""
