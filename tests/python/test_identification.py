"""Who is this? One call, one stream, and 1:1, each answer held against numpy."""

import os
import queue
import signal

import grpc
import pytest
from people import DIM, SCORE_TOLERANCE, TIMEOUT_S, fresh_id, identify_request, sample, unit
from thenar.v1 import identification_pb2 as pb
from thenar.v1.palm_pb2 import HAND_LEFT, HAND_RIGHT, HAND_UNSPECIFIED


def test_an_enrolled_palm_is_found_and_its_score_is_that_of_numpy(people):
    for subject_id, palms in list(people.templates.items())[:20]:
        hand, palm = palms[0]
        probe = people.capture(palm)
        answer = people.identify([sample(probe, hand)])
        assert answer.decision == pb.DECISION_MATCH
        first = answer.candidates[0]
        assert (first.rank, first.subject_id, first.hand) == (1, subject_id, hand)
        assert abs(first.score - people.score(subject_id, [(hand, probe)])[0]) <= SCORE_TOLERANCE


def test_a_palm_of_another_length_is_the_same_palm(people):
    subject_id, [(hand, palm), *_] = next(iter(people.templates.items()))
    for scale in (1e-3, 1000.0):
        answer = people.identify([sample(palm * scale, hand)])
        assert answer.candidates[0].subject_id == subject_id
        assert abs(answer.candidates[0].score - 1) <= SCORE_TOLERANCE


def test_a_stranger_is_nobody(people):
    answer = people.identify([sample(people.palm())])
    assert answer.decision == pb.DECISION_NO_MATCH
    assert not answer.candidates


def test_the_ranking_is_that_of_a_brute_force_scan(people):
    for k in (1, 10, 100):
        for hand in (HAND_UNSPECIFIED, HAND_LEFT, HAND_RIGHT):
            probes = [(hand, people.palm())]
            answer = people.identify([sample(v, h) for h, v in probes], max_candidates=k, threshold=-1.0)
            people.check_ranking(probes, answer, k)


def test_both_palms_of_a_person_are_fused(people):
    subject_id, palms = people.enrol((HAND_LEFT, HAND_RIGHT))
    probes = [(hand, people.capture(palm)) for hand, palm in palms]
    answer = people.identify([sample(v, h) for h, v in probes], max_candidates=20, threshold=-1.0)
    first = answer.candidates[0]
    assert (answer.decision, first.subject_id, first.probes_compared) == (pb.DECISION_MATCH, subject_id, 2)
    left, right = (people.score(subject_id, [probe])[0] for probe in probes)
    assert abs(first.score - (left + right) / 2) <= SCORE_TOLERANCE
    people.check_ranking(probes, answer, 20)


def test_a_left_palm_is_not_compared_with_a_right_one(people):
    subject_id, [(_, palm)] = people.enrol((HAND_LEFT,))
    assert people.identify([sample(palm, HAND_RIGHT)]).decision == pb.DECISION_NO_MATCH
    assert people.identify([sample(palm)]).candidates[0].subject_id == subject_id


def test_two_people_who_are_too_alike_are_told_and_not_let_in(people):
    first, [(hand, palm)] = people.enrol((HAND_RIGHT,))
    # A score of 1 for the one and about 0.99 for the other: further apart than rounding, and
    # within the margin of 0.03.
    alike = unit(palm + 0.15 * people.palm())
    assert 2 * SCORE_TOLERANCE < 1 - palm @ alike < 0.025
    twin, _ = people.enrol((HAND_RIGHT,), palms=[(hand, alike)])
    try:
        answer = people.identify([sample(palm, hand)], max_candidates=5)
        assert answer.decision == pb.DECISION_INCONCLUSIVE
        assert [candidate.subject_id for candidate in answer.candidates] == [first, twin]
    finally:
        people.forget(twin)
    assert people.identify([sample(palm, hand)]).decision == pb.DECISION_MATCH


def test_a_client_may_be_stricter_than_the_policy_and_not_laxer(people):
    subject_id, [(hand, palm), *_] = next(iter(people.templates.items()))
    probe = people.capture(palm)
    score = people.score(subject_id, [(hand, probe)])[0]
    policy = people.identify([sample(probe, hand)])
    assert (policy.decision, policy.threshold) == (pb.DECISION_MATCH, 0.58)
    strict = people.identify([sample(probe, hand)], threshold=score + 0.01)
    assert strict.decision == pb.DECISION_NO_MATCH
    assert strict.threshold == pytest.approx(score + 0.01)
    assert not strict.candidates
    stranger = people.palm()
    lax = people.identify([sample(stranger)], threshold=-1.0, max_candidates=3)
    assert (lax.decision, lax.threshold, len(lax.candidates)) == (pb.DECISION_NO_MATCH, 0.58, 3)


def test_an_answer_says_why_it_is_exact_and_where_its_time_went(people):
    request = identify_request([sample(people.palm())])
    answer = people.client.identification.Identify(request, timeout=TIMEOUT_S)
    assert answer.request_id == request.request_id
    assert answer.gallery_size == people.count()
    assert answer.certificate.kind in (pb.Certificate.KIND_DETERMINISTIC, pb.Certificate.KIND_RANDOMISED)
    assert 0 <= answer.certificate.miss_probability <= 1e-12
    timing = answer.timing
    for stage in ("queue", "prefilter", "refine", "total"):
        assert timing.HasField(stage), stage
    spent = [getattr(timing, stage).ToNanoseconds() for stage in ("queue", "prefilter", "refine", "total")]
    assert all(nanoseconds >= 0 for nanoseconds in spent)
    assert max(spent[:3]) <= spent[3] < TIMEOUT_S * 1e9
    assert spent[3] > 0
    again = people.client.identification.Identify(request, timeout=TIMEOUT_S)
    assert again.search_id != answer.search_id, "searches repeat, their names do not"


def test_verify_says_whether_it_is_that_person(people):
    subject_id, palms = people.enrol((HAND_LEFT, HAND_RIGHT))

    def verify(probes):
        request = pb.VerifyRequest(
            request_id=fresh_id(),
            venue_id="till-1",
            purpose=pb.PURPOSE_PAYMENT,
            subject_id=subject_id,
            probes=[sample(v, h) for h, v in probes],
        )
        answer = people.client.identification.Verify(request, timeout=TIMEOUT_S)
        assert (answer.request_id, answer.threshold) == (request.request_id, 0.62)
        return answer

    own = [(hand, people.capture(palm)) for hand, palm in palms]
    for probes in (own, own[:1], own[1:]):
        answer = verify(probes)
        assert answer.decision == pb.DECISION_MATCH
        assert abs(answer.score - people.score(subject_id, probes)[0]) <= SCORE_TOLERANCE
    other = [(HAND_UNSPECIFIED, people.palm())]
    answer = verify(other)
    assert answer.decision == pb.DECISION_NO_MATCH
    assert abs(answer.score - people.score(subject_id, other)[0]) <= SCORE_TOLERANCE


def test_verify_of_a_hand_that_was_never_enrolled_scores_minus_one(people):
    subject_id, [(_, palm)] = people.enrol((HAND_LEFT,))
    answer = people.client.identification.Verify(
        pb.VerifyRequest(
            request_id=fresh_id(),
            venue_id="till-1",
            purpose=pb.PURPOSE_PAYMENT,
            subject_id=subject_id,
            probes=[sample(palm, HAND_RIGHT)],
        ),
        timeout=TIMEOUT_S,
    )
    assert (answer.decision, answer.score) == (pb.DECISION_NO_MATCH, -1)


def test_a_stream_answers_every_request_under_its_own_id(people):
    asked = {}
    for number in range(300):
        subject_id = list(people.templates)[number % 150]
        hand, palm = people.templates[subject_id][0]
        mated = number % 3 > 0
        probe = people.capture(palm) if mated else people.palm()
        request = identify_request([sample(probe, hand)])
        asked[request.request_id] = (request, subject_id if mated else None)
    requests = iter([request for request, _ in asked.values()])
    answers = list(people.client.identification.IdentifyStream(requests, timeout=TIMEOUT_S))
    assert len(answers) == len(asked)
    for answer in answers:
        _, subject_id = asked.pop(answer.request_id)
        assert answer.WhichOneof("outcome") == "response"
        assert answer.response.request_id == answer.request_id
        found = answer.response.candidates[0].subject_id if answer.response.candidates else None
        assert found == subject_id
    assert not asked


def test_a_bad_request_leaves_the_stream_open(people):
    _, [(hand, palm), *_] = next(iter(people.templates.items()))
    good = [identify_request([sample(palm, hand)]) for _ in range(3)]
    bad = identify_request([sample([1.0] * (DIM - 1))])
    requests = queue.Queue()
    answers = people.client.identification.IdentifyStream(iter(requests.get, None), timeout=TIMEOUT_S)

    def ask(request):
        requests.put(request)
        answer = next(answers)
        assert answer.request_id == request.request_id
        return answer

    assert ask(good[0]).response.decision == pb.DECISION_MATCH
    refused = ask(bad)
    assert refused.WhichOneof("outcome") == "error"
    assert refused.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "probes[0].embedding.values" in refused.error.message and str(DIM) in refused.error.message
    assert ask(good[1]).response.decision == pb.DECISION_MATCH
    # A request without an id is refused under an empty one.
    assert ask(pb.IdentifyRequest()).WhichOneof("outcome") == "error"
    assert ask(good[2]).response.decision == pb.DECISION_MATCH
    requests.put(None)
    assert list(answers) == [], "the server ends the stream when the client has"


def test_a_gate_that_vanishes_disturbs_nobody(people):
    requests = queue.Queue()
    answers = people.client.identification.IdentifyStream(iter(requests.get, None), timeout=TIMEOUT_S)
    requests.put(identify_request([sample(people.palm())]))
    next(answers)
    answers.cancel()
    requests.put(None)
    assert people.identify([sample(people.palm())]).decision == pb.DECISION_NO_MATCH


def test_a_server_that_stands_still_is_given_up_at_the_deadline(people, server):
    probe = sample(people.palm())
    server.process.send_signal(signal.SIGSTOP)
    # The signal is on its way until every thread has stopped.
    assert os.WIFSTOPPED(os.waitpid(server.process.pid, os.WUNTRACED)[1])
    try:
        with pytest.raises(grpc.RpcError) as refused:
            people.client.identification.Identify(identify_request([probe]), timeout=0.2)
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert refused.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    answer = people.client.identification.Identify(identify_request([probe]), timeout=TIMEOUT_S)
    assert answer.decision == pb.DECISION_NO_MATCH


def only(*subject_ids):
    return pb.SubjectFilter(subject_ids=subject_ids)


def test_only_the_subjects_named_are_found_and_ranked_as_if_nobody_else_were_there(people):
    everybody = list(people.templates)
    for size in (1, 7, 50):
        named = [everybody[int(at)] for at in people.rng.choice(len(everybody), size, replace=False)]
        hand, palm = people.templates[named[0]][0]
        probe = people.capture(palm)
        answer = people.identify([sample(probe, hand)], max_candidates=100, threshold=-1.0, only=only(*named, "nobody"))
        people.check_ranking([(hand, probe)], answer, 100, named)
        assert (answer.decision, answer.candidates[0].subject_id) == (pb.DECISION_MATCH, named[0])
        assert answer.gallery_size == people.count()
        others = [subject_id for subject_id in everybody if subject_id not in named][:50]
        assert people.identify([sample(probe, hand)], only=only(*others)).decision == pb.DECISION_NO_MATCH


def test_a_ticket_holder_who_deletes_everything_is_not_found_and_no_error(people):
    subject_id, [(hand, palm)] = people.enrol((HAND_LEFT,))
    other, _ = people.enrol((HAND_LEFT,))
    holders = only(subject_id, other)
    assert people.identify([sample(palm, hand)], only=holders).candidates[0].subject_id == subject_id
    people.forget(subject_id)
    assert people.identify([sample(palm, hand)], only=holders).decision == pb.DECISION_NO_MATCH
    people.enrol((HAND_LEFT,), palms=[(hand, palm)])
    assert people.identify([sample(palm, hand)], only=holders).decision == pb.DECISION_NO_MATCH, "another id"


def test_a_stream_takes_a_filter_for_each_request_and_a_bad_one_is_named(people):
    subject_id, [(hand, palm)] = people.enrol((HAND_LEFT,))
    filters = {"in": only(subject_id, "x"), "out": only("x"), "none": only(), "twice": only("x", "y", "x")}
    requests = {name: identify_request([sample(palm, hand)], only=chosen) for name, chosen in filters.items()}
    names = {request.request_id: name for name, request in requests.items()}
    answers = people.client.identification.IdentifyStream(iter(requests.values()), timeout=TIMEOUT_S)
    answers = {names[answer.request_id]: answer for answer in answers}
    assert answers["in"].response.decision == pb.DECISION_MATCH
    assert answers["out"].response.decision == pb.DECISION_NO_MATCH
    assert answers["none"].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "only.subject_ids" in answers["none"].error.message
    assert "only.subject_ids[2]" in answers["twice"].error.message
