"""What the Colab notebooks use of `google.colab`, for a test: it notes what was asked of it in the
file $COLAB_STAND_IN.

`google` has no `__init__.py`, here as in Colab: other packages live in that namespace, too."""
import os
from pathlib import Path


def note(words: str) -> None:
    with open(os.environ["COLAB_STAND_IN"], "a", encoding="utf-8") as file: file.write(words + "\n")


class drive:
    @staticmethod
    def mount(folder: str) -> None:
        Path(folder, "MyDrive").mkdir(parents=True, exist_ok=True)
        note(f"mount {folder}")


class files:
    @staticmethod
    def download(path: str) -> None:
        assert Path(path).is_file(), path
        note(f"download {path}")
