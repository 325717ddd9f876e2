"""What is refused, with which code, and that the message names the field and the limit."""

import copy

import grpc
import pytest
from conftest import Client
from people import DIM, TIMEOUT_S, enroll_request, fresh_id, identify_request, sample
from rpc_pb2 import BadRequest, Status
from thenar.v1 import enrollment_pb2, identification_pb2
from thenar.v1.palm_pb2 import HAND_LEFT, HAND_RIGHT, PalmSample

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
GOOD = [0.1 * (n % 7 + 1) for n in range(DIM)]


def with_value(value, at=5):
    values = list(GOOD)
    values[at] = value
    return values


def details(error):
    """The google.rpc.Status that came with an error."""
    [packed] = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    return Status.FromString(packed)


def refused(call, request, code, words):
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=TIMEOUT_S)
    error = caught.value
    assert error.code() == code, error
    for word in words:
        assert word in error.details(), (word, error.details())
    return error


EMBEDDINGS = {
    "too short": (GOOD[:-1], [f"has {DIM - 1} values", f"{DIM} dimensions"]),
    "too long": (GOOD + [1.0], [f"has {DIM + 1} values", f"{DIM} dimensions"]),
    "empty": ([], ["has 0 values", f"{DIM} dimensions"]),
    "NaN": (with_value(float("nan")), ["value 5", "finite"]),
    "infinite": (with_value(float("inf")), ["value 5", "finite"]),
    "zero": ([0.0] * DIM, ["norm", "1e-6"]),
    "nearly zero": ([1e-9] * DIM, ["norm", "1e-6"]),
}


@pytest.mark.parametrize("what", EMBEDDINGS)
def test_a_bad_embedding_is_refused_wherever_it_is_sent(people, what):
    values, words = EMBEDDINGS[what]
    client = people.client
    known = next(iter(people.templates))
    probes = [sample(GOOD), sample(values)]
    error = refused(
        client.identification.Identify, identify_request(probes), INVALID, ["probes[1].embedding.values", *words]
    )
    # The details say the same to programs.
    [detail] = details(error).details
    violation = BadRequest()
    assert detail.Unpack(violation)
    assert violation.field_violations[0].field == "probes[1].embedding.values"
    verify = identification_pb2.VerifyRequest(
        request_id=fresh_id(), venue_id="till-1", purpose=1, subject_id=known, probes=probes
    )
    refused(client.identification.Verify, verify, INVALID, ["probes[1].embedding.values", *words])
    enrol = enroll_request(people.new()[0], [(HAND_LEFT, GOOD), (HAND_RIGHT, values)])
    refused(client.enrollment.Enroll, enrol, INVALID, ["samples[1].embedding.values", *words])
    update = enrollment_pb2.UpdateSubjectRequest(
        request_id=fresh_id(), subject_id=known, add_samples=[sample(values, HAND_LEFT)]
    )
    refused(client.enrollment.UpdateSubject, update, INVALID, ["add_samples[0].embedding.values", *words])


REQUESTS = {
    "no purpose": (lambda r: r.ClearField("purpose"), INVALID, ["purpose", "missing"]),
    "unknown purpose": (lambda r: setattr(r, "purpose", 9), INVALID, ["purpose", "9"]),
    "no candidates": (lambda r: setattr(r, "max_candidates", 0), INVALID, ["max_candidates", "1 to 100"]),
    "101 candidates": (lambda r: setattr(r, "max_candidates", 101), INVALID, ["max_candidates", "101", "1 to 100"]),
    "no probes": (lambda r: r.ClearField("probes"), INVALID, ["probes", "1 to 4"]),
    "5 probes": (lambda r: r.probes.extend([r.probes[0]] * 4), INVALID, ["probes", "5", "1 to 4"]),
    "an empty probe": (lambda r: r.probes[0].CopyFrom(PalmSample()), INVALID, ["probes[0].content", "missing"]),
    "a picture": (lambda r: r.probes[0].CopyFrom(PalmSample(picture=b"x")), INVALID, ["probes[0].picture", "encoder"]),
    "an unknown hand": (lambda r: setattr(r.probes[0], "hand", 3), INVALID, ["probes[0].hand", "3"]),
    "threshold 2": (lambda r: setattr(r, "threshold", 2.0), INVALID, ["threshold", "-1 to 1"]),
    "threshold NaN": (lambda r: setattr(r, "threshold", float("nan")), INVALID, ["threshold", "-1 to 1"]),
    "no request_id": (lambda r: r.ClearField("request_id"), INVALID, ["request_id", "empty"]),
    "a long request_id": (lambda r: setattr(r, "request_id", "r" * 129), INVALID, ["request_id", "129", "128"]),
    "no venue_id": (lambda r: r.ClearField("venue_id"), INVALID, ["venue_id", "empty"]),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_a_bad_search_is_refused(people, what):
    change, code, words = REQUESTS[what]
    request = identify_request([sample(GOOD)])
    change(request)
    refused(people.client.identification.Identify, request, code, words)
    [answer] = people.client.identification.IdentifyStream(iter([request]), timeout=TIMEOUT_S)
    assert answer.request_id == request.request_id
    assert answer.error.code == code.value[0]
    assert all(word in answer.error.message for word in words), answer.error.message


def test_a_subject_id_is_taken_once(people):
    taken = next(iter(people.templates))
    request = enroll_request(taken, people.new()[1])
    refused(people.client.enrollment.Enroll, request, grpc.StatusCode.ALREADY_EXISTS, ["subject_id", taken])


@pytest.mark.parametrize("subject_id, words", [("", ["empty"]), ("s" * 65, ["65", "64"]), ("a b", ["' '"])])
def test_a_subject_id_has_limits(people, subject_id, words):
    request = enroll_request(subject_id, people.new()[1])
    refused(people.client.enrollment.Enroll, request, INVALID, ["subject_id", *words])


def test_a_person_has_1_to_16_samples(people):
    for count in (0, 17):
        request = enroll_request(people.new()[0], [(HAND_LEFT, GOOD)] * count)
        refused(people.client.enrollment.Enroll, request, INVALID, ["samples", str(count), "1 to 16"])


def test_nobody_is_not_found(people):
    client, nobody = people.client, "nobody-of-this-name"
    words = ["subject_id", nobody]
    forget = enrollment_pb2.ForgetRequest(request_id=fresh_id(), subject_id=nobody)
    refused(client.enrollment.Forget, forget, NOT_FOUND, words)
    refused(client.enrollment.GetSubject, enrollment_pb2.GetSubjectRequest(subject_id=nobody), NOT_FOUND, words)
    update = enrollment_pb2.UpdateSubjectRequest(
        request_id=fresh_id(), subject_id=nobody, add_samples=[sample(GOOD, HAND_LEFT)]
    )
    refused(client.enrollment.UpdateSubject, update, NOT_FOUND, words)
    verify = identification_pb2.VerifyRequest(
        request_id=fresh_id(), venue_id="till-1", purpose=1, subject_id=nobody, probes=[sample(GOOD)]
    )
    refused(client.identification.Verify, verify, NOT_FOUND, words)


def test_a_venue_that_is_not_the_servers_is_not_found(start):
    # The key stands before the first section, where the configuration has its own.
    server = start(top='venues = ["stadium"]\n')
    with server.channel() as channel:
        call = Client(channel).identification.Identify
        assert call(identify_request([sample(GOOD)], venue_id="stadium"), timeout=TIMEOUT_S).gallery_size == 0
        refused(call, identify_request([sample(GOOD)], venue_id="store"), NOT_FOUND, ["venue_id", "store"])


def test_a_message_over_the_limit_is_refused_and_the_connection_lives(people):
    client = people.client
    limits = ((client.identification.Identify, 256 << 10), (client.enrollment.Enroll, 1 << 20))
    for call, limit in limits:
        values = [0.5] * (limit // 4 + 1)
        if limit == 256 << 10:
            request = identify_request([sample(values)])
        else:
            request = enroll_request(people.new()[0], [(HAND_LEFT, values)])
        refused(call, request, grpc.StatusCode.RESOURCE_EXHAUSTED, [str(limit)])
    assert people.identify([sample(GOOD)]).gallery_size == people.count()


def test_a_bulk_message_has_1_to_1024_people(people):
    item = enrollment_pb2.BulkEnrollItem(sequence=1, enrollment=enroll_request("x", []))
    for count in (0, 1025):
        message = enrollment_pb2.BulkEnrollRequest(items=[copy.copy(item) for _ in range(count)])
        with pytest.raises(grpc.RpcError) as caught:
            list(people.client.enrollment.BulkEnroll(iter([message]), timeout=TIMEOUT_S))
        assert caught.value.code() == INVALID
        assert all(word in caught.value.details() for word in ("items", str(count), "1 to 1024"))
