"""Odd headers, read as the safetensors library reads them: the library itself is the oracle."""

import json

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bulkedge import CheckpointError, audit
from bulkedge.checkpoint import read_header
from helpers import raw_safetensors, save, weights

GOOD = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
EIGHT = bytes(range(8))


def entry(more="", dtype='"F32"', shape="[2]", span="[0,8]", first=""):
    return f'{{"w":{{{first}"dtype":{dtype},"shape":{shape},"data_offsets":{span}{more}}}}}'


def before(text):
    """Something in front of a good entry."""
    return f'{{{text},"w":{GOOD}}}'


def other(text):
    """A good entry that has a field of its own."""
    return entry(more=f',"more":{text}')


def named(name):
    return f'{{"{name}":{GOOD}}}'


ODD = {
    "plain": entry(),
    "blanks in front": " \n\t\r" + entry(),
    "blanks behind": entry() + " \n\t\r",
    "NUL in front": "\0" + entry(),
    "NUL behind": entry() + "\0",
    "form feed in front": "\f" + entry(),
    "no-break space in front": "\u00a0" + entry(),
    "byte order mark": "\ufeff" + entry(),
    "metadata null": before('"__metadata__":null'),
    "metadata empty": before('"__metadata__":{}'),
    "metadata list": before('"__metadata__":[]'),
    "metadata of strings": before('"__metadata__":{"a":"b"}'),
    "metadata of numbers": before('"__metadata__":{"a":1}'),
    "metadata of nulls": before('"__metadata__":{"a":null}'),
    "metadata twice": before('"__metadata__":{},"__metadata__":{}'),
    "metadata null, then not": before('"__metadata__":null,"__metadata__":{}'),
    "metadata like an entry": before(f'"__metadata__":{GOOD}'),
    "metadata behind": f'{{"w":{GOOD},"__metadata__":{{"a":"b"}}}}',
    "metadata with half a character": before(r'"__metadata__":{"a":"\ud800"}'),
    "metadata key with half a character": before(r'"__metadata__":{"\uDFFF":"a"}'),
    "other field": other("1"),
    "other field in front": entry(first='"more":{"a":[1,{"b":null}]},'),
    "other field NaN": other("NaN"),
    "other field Infinity": other("-Infinity"),
    "other field 1e999": other("1e999"),
    "other field 1e-999": other("1e-999"),
    "other field of 300 digits": other("9" * 300),
    "other field of 400 digits": other("9" * 400),
    "other field of 5000 digits": other("-" + "9" * 5000),
    "other field -0": other("-0"),
    "other field with half a character": other(r'"\ud800"'),
    "other field's key with half a character": entry(more=r',"\udc00":1'),
    "other field's key beyond 16 bits": entry(more=r',"\ud83d\ude00":1'),
    "tensor that is a number": before('"x":1'),
    "tensor null": before('"x":null'),
    "entry as a list": '{"w":["F32",[2],[0,8]]}',
    "entry as a list of four": '{"w":["F32",[2],[0,8],1]}',
    "entry as a list of two": '{"w":["F32",[2]]}',
    "header as a list": "[null]",
    "header null": "null",
    "header a string": '"a"',
    "two headers": entry() + entry(),
    "comma too many": entry(more=","),
    "comment": "/* */" + entry(),
    "single quotes": "{'w':1}",
    "only blanks": "   ",
    "dtype as an object": entry(dtype='{"F32":null}'),
    "dtype as an object of an object": entry(dtype='{"F32":{}}'),
    "dtype as an object of two": entry(dtype='{"F32":null,"F16":null}'),
    "dtype by number": entry(dtype="17"),
    "dtype null": entry(dtype="null"),
    "dtype in lower case": entry(dtype='"f32"'),
    "dtype with an escape": entry(dtype=r'"\u004632"'),
    "dtype twice": entry(more=',"dtype":"F32"'),
    "no dtype": '{"w":{"shape":[2],"data_offsets":[0,8]}}',
    "shape -0": entry(shape="[-0]", span="[0,0]"),
    "offset -0": entry(span="[-0,8]"),
    "shape 2.0": entry(shape="[2.0]"),
    "shape 2e0": entry(shape="[2e0]"),
    "shape 02": entry(shape="[02]"),
    "shape true": entry(shape="[true,2]"),
    "shape of strings": entry(shape='["2"]'),
    "shape null": entry(shape="null"),
    "shape as an object": entry(shape='{"0":2}'),
    "nine dimensions": entry(shape=str([1] * 8 + [2])),
    "64 dimensions": entry(shape=str([1] * 63 + [2])),
    "size of 64 bits": entry(shape=f"[{2**64 - 1},0]", span="[0,0]"),
    "size of 65 bits": entry(shape=f"[{2**64},0]", span="[0,0]"),
    "empty behind an overflow": entry(shape=f"[{2**62},4,0]", span="[0,0]"),
    "empty before an overflow": entry(shape=f"[0,{2**62},4]", span="[0,0]"),
    "bits overflow": entry(shape=f"[{2**62}]"),
    "three offsets": entry(span="[0,8,8]"),
    "offsets as an object": entry(span='{"0":0,"1":8}'),
    "offsets swapped": entry(span="[8,0]"),
    "hole": entry(span="[8,16]"),
    "overlap": f'{{"a":{GOOD},"b":{GOOD}}}',
    "fewer bytes than there are": entry(shape="[1]", span="[0,4]"),
    "more bytes than there are": entry(shape="[4]", span="[0,16]"),
    "empty tensor inside another": before('"z":{"dtype":"U8","shape":[0],"data_offsets":[5,5]}'),
    "empty tensor behind": before('"z":{"dtype":"U8","shape":[0],"data_offsets":[8,8]}'),
    "empty tensor beyond": before('"z":{"dtype":"U8","shape":[0],"data_offsets":[9,9]}'),
    "no tensors, but bytes": "{}",
    "half a byte": entry(dtype='"F4"', shape="[15]"),
    "four bits": entry(dtype='"F4"', shape="[16]"),
    "six bits": '{"w":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]},'
    '"x":{"dtype":"U8","shape":[5],"data_offsets":[3,8]}}',
    "128 bits": entry(dtype='"C128"', shape="[1]"),
    "empty name": named(""),
    "name with NUL": named(r"\u0000"),
    "name with a raw control character": named("a\x01"),
    "name with a raw tab": named("a\t"),
    "name with DEL": named("a\x7f"),
    "name with an unknown escape": named(r"\q"),
    "name with an escaped slash": named(r"a\/b"),
    "name with half an escape": named(r"\u 123"),
    "name with half a character": named(r"\ud800"),
    **{f"lists {n} deep": other("[" * n + "]" * n) for n in (100, 125, 126, 128, 200, 2000)},
    **{f"objects {n} deep": other('{"a":' * n + "1" + "}" * n) for n in (124, 125, 126)},
}  # fmt: skip
NO_TEXT = {
    "name not UTF-8": b'{"\xff":%s}',
    "name with an overlong NUL": b'{"\xc0\x80":%s}',
    "name with half a character in UTF-8": b'{"\xed\xa0\x80":%s}',
}
AMBIGUOUS = {
    "tensor": f'{{"w":{GOOD},"w":{GOOD}}}',
    "tensor by another spelling": f'{{"w":{GOOD},"\\u0077":{GOOD}}}',
    "metadata": before('"__metadata__":{"a":"1","a":"2"}'),
    "other field": entry(more=',"more":1,"more":2'),
    "inside of another field": other('{"a":1,"a":2}'),
}
BEYOND = {
    "name": (named("n" * 1025), "name has 1025 characters"),
    "parts": (named(".".join("a" * 65)), "name has over 64 parts"),
    "dimensions": (entry(shape=str([1] * 64 + [2])), "bad shape"),
}


def by_library(path):
    """Name, dtype and shape of every tensor; None of a file that the library refuses."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except safetensors.SafetensorError:
        return None


def by_us(path):
    try:
        infos, _ = read_header(path)
    except CheckpointError:
        return None
    return {name: (info.dtype, info.shape) for name, info in infos.items()}


@pytest.mark.parametrize("case", [*ODD, *NO_TEXT])
def test_what_the_library_reads_is_read_and_what_it_refuses_is_refused(case, tmp_path):
    text = ODD[case].encode() if case in ODD else NO_TEXT[case] % GOOD.encode()
    data = b"" if b"[0,0]" in text else EIGHT
    path = raw_safetensors(tmp_path / "x.safetensors", text, data)
    assert by_us(path) == by_library(path)


def test_the_table_has_both_kinds(tmp_path):
    path = tmp_path / "x.safetensors"
    read = [by_library(raw_safetensors(path, text.encode(), EIGHT)) for text in ODD.values()]
    assert min(sum(found is None for found in read), sum(found is not None for found in read)) > 20


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_duplicate_keys_are_refused_though_the_library_takes_one(case, tmp_path):
    path = raw_safetensors(tmp_path / "x.safetensors", AMBIGUOUS[case].encode(), EIGHT)
    assert by_library(path) is not None
    with pytest.raises(CheckpointError, match="duplicate key"):
        read_header(path)


@pytest.mark.parametrize("case", BEYOND)
def test_limits_of_our_own(case, tmp_path):
    text, message = BEYOND[case]
    path = raw_safetensors(tmp_path / "x.safetensors", text.encode(), EIGHT)
    assert by_library(path) is not None
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=500)
@given(case=st.sampled_from(sorted(ODD)), data=st.data())
def test_mutated_headers(case, data, tmp_path):
    text = bytearray(ODD[case].encode()[:400])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text)))
        put = data.draw(
            st.sampled_from([b"", b"0", b"-", b".", b'"', b"{", b"]", b" ", b"\\u", b","])
        )
        text[place : place + data.draw(st.integers(0, 1))] = put
    path = raw_safetensors(tmp_path / "x.safetensors", bytes(text), EIGHT)
    expected, found = by_library(path), by_us(path)
    if expected is None or found is not None:
        assert found == expected
        return
    with pytest.raises(CheckpointError, match=r"duplicate key|\d characters|over 64 parts"):
        read_header(path)


@pytest.mark.parametrize("odd", ["blanks", "metadata", "field"])
def test_an_odd_file_is_audited_as_the_plain_one_is(odd, tmp_path):
    base = save(tmp_path / "base.safetensors", {"w": weights(6, 6)})
    tuned = save(tmp_path / "tuned.safetensors", {"w": weights(6, 6, seed=1)})
    content = tuned.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    if odd == "field":
        header["w"]["more"] = {"a": [1]}
    text = json.dumps(({"__metadata__": None} if odd == "metadata" else {}) | header)
    text = " \n" + text if odd == "blanks" else text
    other = raw_safetensors(tmp_path / "odd.safetensors", text.encode(), content[length:])
    plain, odd_one = (audit(base, path, recipe={"top_k": 2}) for path in (tuned, other))
    assert plain.matrices == odd_one.matrices


def test_a_number_that_double_precision_cannot_hold(tmp_path):
    """The library refuses it too, wherever it stands."""
    path = raw_safetensors(tmp_path / "m.safetensors", other("1e999").encode(), EIGHT)
    with pytest.raises(CheckpointError, match="number out of range: 1e999"):
        read_header(path)
