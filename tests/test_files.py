"""Files appear whole or not at all."""

from pathlib import Path

import pytest

from refold.errors import InputError
from refold.files import make_folder, write_text, written_aside


def test_a_file_appears_with_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with written_aside(tmp_path / "new") as aside:
        assert not (tmp_path / "new").exists()
        aside.unlink()
        aside.write_text("x")
        aside.chmod(0o600)
    assert (tmp_path / "new").read_text() == "x"
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "kept"
    target.write_text("old")

    def interrupted() -> None:
        with written_aside(target) as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a folder"):
        write_text(tmp_path, "x")
    with pytest.raises(InputError, match="does not exist; create it first"):
        write_text(tmp_path / "missing" / "x", "x")
    with pytest.raises(InputError, match="cannot be made"):
        make_folder(tmp_path / "file" / "inside")
    with pytest.raises(InputError, match="cannot be written: No space left"), written_aside(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
