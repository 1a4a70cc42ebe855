"""Types of command-line arguments that name files: by them `itm submit` knows what a cluster must be able to read and would lose."""


def read_from(text: str) -> str:
    """A file, folder or URI that is read."""
    return text


def written_to(text: str) -> str:
    """A file, folder or URI that is written."""
    return text
