"""The toy world: cartoon people in eight places, drawn here, with exact masks, captions and identity vectors."""

from moa_train.data.sources.toyworld.captions import CONTEXTS, describe, scene_caption
from moa_train.data.sources.toyworld.identities import IDENTITY_DIM, NOUN_PARTS, NOUNS, SPLITS, Identity, identity
from moa_train.data.sources.toyworld.scene import Scene, Segment, draw_portrait, draw_scene

__all__ = [
    "CONTEXTS",
    "IDENTITY_DIM",
    "NOUN_PARTS",
    "NOUNS",
    "SPLITS",
    "Identity",
    "Scene",
    "Segment",
    "describe",
    "draw_portrait",
    "draw_scene",
    "identity",
    "scene_caption",
]
