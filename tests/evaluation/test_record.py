"""Records: what is written is read, and nothing else is taken for one."""

from dataclasses import replace

import pytest
import torch

from ldm.errors import DataError
from ldm.evaluation.record import Record, file_name, machine, rounding, versions
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


def test_values_of_the_same_measurement_stand_side_by_side():
    subject = {"name": "x", "kind": "samples", "pictures": "a hash", "training": {}}
    notes = ["fdr, kid: left out: no reason", "a note"]
    earlier = replace(RECORD, subject=subject, notes=notes, versions={"torch": "1"}, date="before")
    again = replace(VALUES[0], value=11.0, settings={"images": 10, "found": 0.5})
    other = [Value("FID", 1.0, features="other"), Value("KID", 1.0)]
    found = replace(earlier, values=[again, *other], notes=["new"], sheets={"nearest": "b.png"}, date="now")
    whole = found.beside(earlier, ["fd", "kid"])
    assert whole.values == [VALUES[1], again, *other]
    assert whole.notes == ["a note", "new"]
    assert whole.sheets == {"pictures": "a.png", "nearest": "b.png"}
    assert whole.date == "now"
    assert found.beside(replace(earlier, versions={"torch": "2"}), []) is None
    assert found.beside(replace(earlier, machine={"device": "cuda"}), []) is None
    assert found.beside(replace(earlier, protocol={"images": 11}), []) is None
    assert found.beside(replace(earlier, subject={**subject, "pictures": "another"}), []) is None
    assert RECORD.beside(RECORD, []) is None  # of which pictures they are is not known


def test_values_of_two_spaces_are_told_apart():
    values = [Value("FD-CLIP", 1.0, features="clip-b"), Value("FD-CLIP", 2.0, features="clip-l")]
    record = replace(RECORD, values=values)
    assert [record.value("FD-CLIP", one.features) for one in values] == values


def test_how_float32_was_rounded_is_said():
    cpu = torch.device("cpu")
    assert rounding(None) == rounding(["none", "ieee"]) == ""
    assert machine(cpu)["precision"] == machine(cpu, "")["precision"] == "float32"
    rounded = machine(cpu, rounding(["tf32", "none"]))["precision"]
    assert rounded == "float32 (of samples tf32 in convolutions, none in matrix products)"
