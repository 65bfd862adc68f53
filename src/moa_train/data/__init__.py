"""From stored pictures with subjects to padded batches: shards, their index, the stream, the stages."""
