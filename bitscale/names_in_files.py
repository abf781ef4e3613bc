"""Names that a file gives of other files: only of its own directory.

A checkpoint or a corpus may come from somebody else. What it names is read, checked, copied into
exports or moved, so a name that leads elsewhere is refused before it is used.
"""


def is_plain(name: object) -> bool:
    """Whether `name` is that of an entry of a directory, and of no other place: no separator, no
    parent, nothing hidden in control characters."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    return not set(name) & {"/", "\\"} and name.isprintable()
