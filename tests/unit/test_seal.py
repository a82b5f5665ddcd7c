"""Seal: the construction, its vector, and that every wrong box is refused."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fjmcp_broker import Keyring, hkdf, seal_with, unseal_with

KEY = bytes(range(32))
VECTOR = (
    "464a312ade72fa0000000000000000000000000000000000000000000000000000000000000000"
    "cfa4d80393fe9f96a520da701827a3f10b3c92d4e454c75ba53dc34fc4a512cb9e48b30f7b56d9b8c34a32f834cec78f063b348f98"
)


def test_the_published_vector_is_met():
    assert seal_with(KEY, "upstream", "user:42", b"forgejo-refresh-token", bytes(32)).hex() == VECTOR
    assert unseal_with(KEY, "upstream", "user:42", bytes.fromhex(VECTOR)) == b"forgejo-refresh-token"


def test_hkdf_meets_rfc_5869_appendix_a_1():
    okm = hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"


@given(st.binary(max_size=2000), st.text(max_size=20), st.text(max_size=20))
def test_what_was_sealed_opens_for_the_same_purpose_and_owner(plain, purpose, owner):
    purpose, owner = (text.encode("utf-8", "ignore").decode() for text in (purpose, owner))
    assert unseal_with(KEY, purpose, owner, seal_with(KEY, purpose, owner, plain)) == plain


def test_G12_every_flipped_bit_and_every_truncation_is_refused():
    box = bytes.fromhex(VECTOR)
    for index in range(len(box) * 8):
        wrong = bytearray(box)
        wrong[index // 8] ^= 1 << index % 8
        with pytest.raises(ValueError):
            unseal_with(KEY, "upstream", "user:42", bytes(wrong))
    for size in range(len(box)):
        with pytest.raises(ValueError):
            unseal_with(KEY, "upstream", "user:42", box[:size])


PURPOSES = st.sampled_from(["upstream", "grace", "probe", "login", "", "upstream/", "user"])
OWNERS = st.sampled_from(["user:4", "user:42", "user:421", "store", "", "upstreamuser:42"]) | st.text(
    max_size=12
).filter(str.isprintable)


@settings(max_examples=300, deadline=None)
@given(plain=st.binary(max_size=700), purpose=PURPOSES, owner=OWNERS, data=st.data())
def test_G12_any_change_to_any_box_is_refused_before_anything_is_decrypted(plain, purpose, owner, data):
    box = seal_with(KEY, purpose, owner, plain)
    kind = data.draw(st.sampled_from(["flip", "cut", "cut front", "insert", "append", "swap", "replace"]))
    where = data.draw(st.integers(0, len(box) - 1))
    if kind == "flip":
        wrong = bytearray(box)
        wrong[where] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "swap":
        other = seal_with(KEY, purpose, owner, plain)
        wrong = box[:where] + other[where:]
        assume(wrong not in (box, other))
    else:
        junk = data.draw(st.binary(min_size=1, max_size=80))
        wrong = {
            "cut": box[:where],
            "cut front": box[where + 1 :],
            "insert": box[:where] + junk + box[where:],
            "append": box + junk,
            "replace": box[:where] + junk + box[where + len(junk) :],
        }[kind]
        assume(wrong != box)
    with pytest.raises(ValueError):
        unseal_with(KEY, purpose, owner, bytes(wrong))


@settings(max_examples=300, deadline=None)
@given(
    plain=st.binary(max_size=100),
    sealed=st.tuples(PURPOSES, OWNERS),
    opened=st.tuples(PURPOSES, OWNERS),
    key=st.sampled_from([KEY, bytes(32)]),
)
def test_G11_a_box_opens_for_no_other_mix_of_purpose_owner_and_key(plain, sealed, opened, key):
    assume((*sealed, KEY) != (*opened, key))
    with pytest.raises(ValueError):
        unseal_with(key, *opened, seal_with(KEY, *sealed, plain))


@settings(max_examples=300, deadline=None)
@given(box=st.binary(max_size=400))
def test_G12_whatever_is_no_box_is_refused(box):
    for ring in (Keyring([KEY]), Keyring([KEY, bytes(32)])):
        with pytest.raises(ValueError):
            ring.unseal("upstream", "user:42", box)
        with pytest.raises(ValueError):
            ring.unseal("upstream", "user:42", seal_with(KEY, "", "", b"")[:7] + box)


@pytest.mark.parametrize(
    "purpose, owner", [("grace", "user:42"), ("upstream", "user:43"), ("upstream", "user:4")]
)
def test_G11_a_box_moved_to_another_owner_or_purpose_does_not_open(purpose, owner):
    with pytest.raises(ValueError):
        unseal_with(KEY, purpose, owner, bytes.fromhex(VECTOR))


def test_a_keyring_opens_boxes_of_its_older_keys_and_seals_with_the_newest():
    old, new = Keyring([KEY]), Keyring([bytes(32), KEY])
    box = old.seal("p", "o", {"a": 1})
    assert new.unseal("p", "o", box) == {"a": 1}
    with pytest.raises(ValueError):
        old.unseal("p", "o", new.seal("p", "o", 1))


def test_G18_boxes_of_short_values_have_one_length_and_never_repeat():
    ring = Keyring([KEY])
    boxes = {ring.seal("p", "o", "x" * size) for size in range(100)}
    assert len(boxes) == 100 and len({len(box) for box in boxes}) == 1


def test_only_the_holder_of_a_token_can_open_what_is_chained_to_it():
    ring = Keyring([KEY])
    box = ring.chained("fjr_one").seal("successor", "7", {"refresh": "r"})
    assert ring.chained("fjr_one").unseal("successor", "7", box) == {"refresh": "r"}
    for other in (ring, ring.chained("fjr_two"), Keyring([bytes(32)]).chained("fjr_one")):
        with pytest.raises(ValueError):
            other.unseal("successor", "7", box)


@pytest.mark.parametrize("text", ["", "not base64!", "AAAA", "\n\n"])
def test_G13_a_key_that_is_none_is_named(text):
    with pytest.raises(ValueError):
        Keyring.parse(text)
