"""Errors that a user can cause and mend.

The command line prints their message in one line and exits with code 2; everything else is a
bug and keeps its traceback (exit code 1). A message names the value, the reason and the remedy.
"""


class BitscaleError(Exception):
    """Base of every error whose cause is input: configuration, data, checkpoint, topology."""


class ConfigError(BitscaleError):
    """A configuration key is unknown, of the wrong type, or impossible together with another."""


class DataError(BitscaleError):
    """A corpus, tokenizer or token shard is missing, malformed or not the one expected."""


class CheckpointError(BitscaleError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another run."""


class KernelUnavailable(BitscaleError):
    """A requested kernel, dtype or device does not exist on this machine."""


class TrainingFault(BitscaleError):
    """Training went wrong, stopped, and kept its last checkpoint."""


class NonFiniteLoss(TrainingFault):
    """The loss or the gradient norm became NaN or infinite."""


class LossSpike(TrainingFault):
    """The loss rose further above its running level than `transition.guard.spike` allows."""


class PeerLost(BitscaleError):
    """Another rank died, or did not come to a collective in time."""
