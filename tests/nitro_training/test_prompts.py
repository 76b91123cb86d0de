from __future__ import annotations

from pathlib import Path

import pytest

from nitro_rt.errors import ConfigError, ModelNotFound
from nitro_training.prompts import Prompts, PromptsConfig


def write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_prompts_come_in_the_order_of_the_files_and_repeats_stay(tmp_path: Path) -> None:
    files = (write(tmp_path / "b.txt", "a cat\na dog\n"), write(tmp_path / "a.txt", "a cat"))
    prompts = Prompts.load(PromptsConfig(files=files))
    assert prompts.texts == ("a cat", "a dog", "a cat")
    assert (len(prompts), prompts[1]) == (3, "a dog")


def test_a_line_is_a_prompt_whatever_it_begins_with_and_however_it_ends(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", "\ufeff# one\r\n\r\n  \n  two\t\nthree\u2028still three\x0cand here")
    assert Prompts.load(PromptsConfig(files=(file,))).texts == ("# one", "two", "three\u2028still three\x0cand here")


def test_the_digest_is_of_the_prompts_in_order_not_of_the_files(tmp_path: Path) -> None:
    one = Prompts.load(PromptsConfig(files=(write(tmp_path / "1.txt", "a\nb\nc"),)))
    two = Prompts.load(PromptsConfig(files=(write(tmp_path / "2.txt", "a\n\n"), write(tmp_path / "3.txt", "b\r\nc\n"))))
    assert one.sha256 == two.sha256 == Prompts(["a", "b", "c"]).sha256
    assert one.sha256 != Prompts(["a", "c", "b"]).sha256


def test_many_prompts_load(tmp_path: Path) -> None:
    file = write(tmp_path / "many.txt", "".join(f"a photo of number {index}\n" for index in range(200_000)))
    prompts = Prompts.load(PromptsConfig(files=(file,)))
    assert (len(prompts), prompts[199_999]) == (200_000, "a photo of number 199999")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"prompts\.files: cannot read .*none\.txt \(No such file"):
        Prompts.load(PromptsConfig(files=(str(tmp_path / "none.txt"),)))


def test_a_file_without_prompts_is_named(tmp_path: Path) -> None:
    files = (write(tmp_path / "good.txt", "a cat"), write(tmp_path / "empty.txt", " \n\n"))
    with pytest.raises(ConfigError, match=r"empty\.txt holds no prompt"):
        Prompts.load(PromptsConfig(files=files))


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "latin.txt", "a cat\na café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt is not UTF-8 \(line 2\)"):
        Prompts.load(PromptsConfig(files=(file,)))


def test_no_files_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompts\.files needs one or more"):
        PromptsConfig(files=())
