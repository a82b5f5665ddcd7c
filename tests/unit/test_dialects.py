"""A dialect only translates: what it makes of a call can be read back, whatever the call says."""

import json

from hypothesis import given
from hypothesis import strategies as st

from fjmcp_broker import Answer, Call, LegacyDialect, ModernDialect, Question, RequestMeta, classify

NAMES = st.text(max_size=8).filter(lambda name: name not in ("_meta", "inputResponses", "requestState"))
PARAMS = st.dictionaries(
    NAMES, st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=20)), max_size=4
)
DIALECTS = st.sampled_from((LegacyDialect, lambda: ModernDialect({})))


@given(DIALECTS, st.integers(1, 10**9), PARAMS, st.one_of(st.none(), st.text(max_size=8)))
def test_a_call_is_one_line_that_says_the_same_under_its_number(make, number, params, token):
    given_params = params if token is None else {**params, "_meta": {"progressToken": token}}
    line = make().encode(number, Call("tools/call", given_params, 0.0, RequestMeta({})))
    message = classify(json.loads(line))
    meta = message.params.get("_meta", {})
    assert b"\n" not in line and (message.id, message.method) == (number, "tools/call")
    assert {name: value for name, value in message.params.items() if name != "_meta"} == params
    assert meta.get("progressToken") == (None if token is None else number)


@given(DIALECTS, st.integers(1, 10**9), PARAMS)
def test_an_answer_is_read_as_the_answer_to_its_number(make, number, result):
    message = classify({"jsonrpc": "2.0", "id": number, "result": {**result, "resultType": "complete"}})
    assert make().decode(b"x", message) == Answer(number, b"x", message)


@given(st.integers(1, 10**9), st.text(max_size=8), PARAMS)
def test_both_eras_ask_in_their_own_way_and_are_read_alike(number, key, params):
    legacy = classify({"jsonrpc": "2.0", "id": key, "method": "elicitation/create", "params": params})
    assert LegacyDialect().decode(b"x", legacy) == Question(None, ((key, "elicitation/create", params),))
    asked = {"inputRequests": {key: {"method": "elicitation/create", "params": params}}}
    result = {"resultType": "input_required", "requestState": "s", **asked}
    modern = classify({"jsonrpc": "2.0", "id": number, "result": result})
    assert ModernDialect({}).decode(b"x", modern) == Question(
        number, ((key, "elicitation/create", params),), "s"
    )
