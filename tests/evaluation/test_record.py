"""Records: what is written is read, and nothing else is taken for one."""

import pytest

from ldm.errors import DataError
from ldm.evaluation.record import Record, file_name, versions
from ldm.evaluation.values import Value

VALUES = [Value("FID", 12.5, 0.5, 9, 11.0, "inception", settings={"images": 10}), Value("PSNR", 20.0, better="higher")]
RECORD = Record(
    {"name": "x", "kind": "samples", "training": {}}, {"images": 10}, VALUES, ["a note"], {"pictures": "a.png"}
)


def test_what_is_written_is_read(tmp_path):
    RECORD.write(tmp_path / "deep" / "record.json")
    assert Record.read(tmp_path / "deep" / "record.json") == RECORD
    assert RECORD.value("PSNR") is VALUES[1]
    assert RECORD.value("SSIM") is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "values": [{"metric": "FID"}]}'])
def test_what_is_no_record(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(DataError, match=r"record.json: is not a record of `ldm evaluate`"):
        Record.read(tmp_path / "record.json")


def test_names_tell_protocols_apart():
    one, other = (file_name(["step4", "a b/c"], {"images": number}) for number in (10, 20))
    assert one.startswith("step4-a_b_c-")
    assert one != other
    assert len(file_name(["x" * 300], {})) < 200


def test_versions_are_those_of_this_process():
    import torch

    assert versions()["torch"] == torch.__version__.split("+")[0] or versions()["torch"] == torch.__version__
