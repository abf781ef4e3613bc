"""Layout-free checkpoints: fp32 masters and Adam moments as fragments in safetensors.

A checkpoint is a directory `step-00000200/`:

    state-00000-of-00002.safetensors   one a rank: flat fp32 fragments, see `format.key_of`
    meta.json                          step, shapes, configuration, fingerprints, file checksums
    SHA256SUMS                         the same checksums and that of meta.json, for sha256sum -c

Any number of ranks at any ZeRO stage can read what any other wrote: a reader takes the flat
ranges it needs out of whichever files hold them. 16-bit compute weights are not stored; they are
the rounded masters, exactly. Nothing in the directory is executable (no pickle).

A checkpoint comes into being by one rename after everything in it is durable; then `latest`
moves. A crash at any moment leaves the previous one in force.
"""

from bitscale.checkpoint.directory import (
    is_checkpoint_name,
    latest_checkpoint,
    list_checkpoints,
    prune,
    resolve,
    rewind,
    write_meta,
)
from bitscale.checkpoint.format import ANY, FORMAT, Meta, read_meta
from bitscale.checkpoint.read import Reader
from bitscale.checkpoint.saver import Saved, Saver, save
from bitscale.checkpoint.write import give_ordinary_mode

__all__ = [
    "ANY",
    "FORMAT",
    "Meta",
    "Reader",
    "Saved",
    "Saver",
    "give_ordinary_mode",
    "is_checkpoint_name",
    "latest_checkpoint",
    "list_checkpoints",
    "prune",
    "read_meta",
    "resolve",
    "rewind",
    "save",
    "write_meta",
]
