"""People come, change and go, and the very next search knows."""

import queue
import time

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from people import SCORE_TOLERANCE, TIMEOUT_S, enroll_request, fresh_id, sample
from thenar.v1 import administration_pb2
from thenar.v1 import enrollment_pb2 as pb
from thenar.v1.identification_pb2 import DECISION_MATCH, DECISION_NO_MATCH
from thenar.v1.palm_pb2 import HAND_LEFT, HAND_RIGHT


def status(client):
    return client.administration.GetStatus(administration_pb2.GetStatusRequest(), timeout=TIMEOUT_S)


def who(people, hand, palm):
    answer = people.identify([sample(palm, hand)])
    return answer.candidates[0].subject_id if answer.decision == DECISION_MATCH else None


def subject(client, subject_id):
    return client.enrollment.GetSubject(pb.GetSubjectRequest(subject_id=subject_id), timeout=TIMEOUT_S)


def test_an_enrolled_person_is_known_to_the_very_next_search(people):
    for _ in range(20):
        subject_id, palms = people.new((HAND_LEFT, HAND_RIGHT))
        assert [who(people, hand, palm) for hand, palm in palms] == [None, None]
        before = time.time()
        answer = people.client.enrollment.Enroll(enroll_request(subject_id, palms), timeout=TIMEOUT_S)
        people.templates[subject_id] = palms
        assert [who(people, hand, palm) for hand, palm in palms] == [subject_id] * 2
        assert answer.subject.subject_id == subject_id
        assert [template.hand for template in answer.subject.templates] == [HAND_LEFT, HAND_RIGHT]
        assert abs(answer.subject.enrolled_at.ToNanoseconds() / 1e9 - before) < 60
        assert subject(people.client, subject_id) == answer.subject


def test_each_write_has_a_later_place_in_the_log(people):
    places = []
    for _ in range(3):
        answer = people.client.enrollment.Enroll(enroll_request(*(new := people.new())), timeout=TIMEOUT_S)
        people.templates[new[0]] = new[1]
        places.append(answer.lsn)
        places.append(people.forget(new[0]).lsn)
    assert places == sorted(set(places))
    assert status(people.client).registry_lsn >= places[-1]


def test_the_same_request_again_is_answered_as_the_first_time(people):
    new = people.new()
    request = enroll_request(*new)
    first = people.client.enrollment.Enroll(request, timeout=TIMEOUT_S)
    people.templates[new[0]] = new[1]
    assert people.client.enrollment.Enroll(request, timeout=TIMEOUT_S) == first
    other = enroll_request(*people.new())
    other.request_id = request.request_id
    with pytest.raises(grpc.RpcError) as refused:
        people.client.enrollment.Enroll(other, timeout=TIMEOUT_S)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert request.request_id in refused.value.details()


def test_a_bulk_enrolment_tells_its_progress_and_reports_bad_items(people):
    taken = next(iter(people.templates))
    new = [people.new() for _ in range(90)]
    items = [
        pb.BulkEnrollItem(sequence=1000 + n, enrollment=enroll_request(*person)) for n, person in enumerate(new)
    ]
    bad = pb.BulkEnrollItem(sequence=7, enrollment=enroll_request("person-nan", [(HAND_LEFT, [float("nan")] * 96)]))
    double = pb.BulkEnrollItem(sequence=8, enrollment=enroll_request(taken, people.new()[1]))
    messages = [items[:30] + [bad], items[30:60], items[:10] + items[60:] + [double]]
    # One message at a time: the next is sent when the last is acknowledged.
    requests, seen = queue.Queue(), []
    requests.put(pb.BulkEnrollRequest(items=messages[0]))
    for progress in people.client.enrollment.BulkEnroll(iter(requests.get, None), timeout=TIMEOUT_S):
        seen.append(progress)
        following = messages[len(seen) : len(seen) + 1]
        requests.put(pb.BulkEnrollRequest(items=following[0]) if following else None)
        # What is acknowledged is searchable now, not only when the stream ends.
        done = new[: progress.enrolled]
        people.templates.update(done)
        subject_id, [(hand, palm)] = done[-1]
        assert who(people, hand, palm) == subject_id
    totals = [(p.received, p.enrolled, p.unchanged, p.rejected, p.templates) for p in seen]
    assert totals == [(31, 30, 0, 1, 30), (61, 60, 0, 1, 60), (102, 90, 10, 2, 90)]
    errors = [[(error.sequence, error.subject_id, error.code) for error in p.errors] for p in seen]
    assert errors == [[(7, "person-nan", 3)], [], [(8, taken, 6)]]
    assert "samples[0].embedding.values" in seen[0].errors[0].message
    assert all(a.lsn < b.lsn for a, b in zip(seen, seen[1:]))
    assert 0 < seen[0].elapsed.ToNanoseconds() <= seen[-1].elapsed.ToNanoseconds()
    assert status(people.client).templates == people.count()


def test_a_person_changes_palms(people):
    subject_id, [(hand, old)] = people.enrol((HAND_LEFT,))
    [template] = subject(people.client, subject_id).templates
    new = people.palm()
    request = pb.UpdateSubjectRequest(
        request_id=fresh_id("update"),
        subject_id=subject_id,
        add_samples=[sample(new, HAND_RIGHT)],
        remove_template_ids=[template.template_id],
    )
    updated = people.client.enrollment.UpdateSubject(request, timeout=TIMEOUT_S)
    people.templates[subject_id] = [(HAND_RIGHT, new)]
    assert [t.hand for t in updated.templates] == [HAND_RIGHT]
    assert updated.templates[0].template_id > template.template_id
    assert subject(people.client, subject_id) == updated
    assert who(people, hand, old) is None
    assert who(people, HAND_RIGHT, new) == subject_id
    answer = people.identify([sample(new, HAND_RIGHT)])
    assert abs(answer.candidates[0].score - 1) <= SCORE_TOLERANCE
    assert answer.candidates[0].template_id == updated.templates[0].template_id


def test_a_forgotten_person_is_nobody_from_the_next_search_on(people):
    for _ in range(10):
        subject_id, palms = people.enrol((HAND_LEFT, HAND_RIGHT))
        request = pb.ForgetRequest(request_id=fresh_id("forget"), subject_id=subject_id)
        answer = people.client.enrollment.Forget(request, timeout=TIMEOUT_S)
        for hand, palm in palms:
            found = people.identify([sample(palm, hand)], max_candidates=100, threshold=-1.0)
            assert found.decision == DECISION_NO_MATCH
            assert subject_id not in [candidate.subject_id for candidate in found.candidates]
        del people.templates[subject_id]
        assert found.gallery_size == people.count()
        assert (answer.subject_id, answer.templates_erased) == (subject_id, 2)
        with pytest.raises(grpc.RpcError) as refused:
            subject(people.client, subject_id)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        # Asked again after an answer that was lost on the way, it is done, and was done then.
        again = people.client.enrollment.Forget(request, timeout=TIMEOUT_S)
        assert (again.subject_id, again.lsn) == (subject_id, answer.lsn)
    assert status(people.client).subjects == len(people.templates)


def timestamp(seconds):
    moment = Timestamp()
    moment.FromNanoseconds(int(seconds * 1e9))
    return moment


def test_a_list_enrols_a_forgotten_person_only_if_it_says_so(people):
    subject_id, palms = people.enrol()
    [(hand, palm)] = palms
    before = time.time() - 60
    people.forget(subject_id)

    def enrol_from_list(**fields):
        item = pb.BulkEnrollItem(sequence=5, enrollment=enroll_request(subject_id, palms))
        message = pb.BulkEnrollRequest(items=[item], **fields)
        [progress] = people.client.enrollment.BulkEnroll(iter([message]), timeout=TIMEOUT_S)
        return progress

    # A list may be older than the deletion: without a time, or with one before the deletion, nobody comes back.
    for fields in ({}, {"after_forget": timestamp(before)}):
        refused = enrol_from_list(**fields)
        assert (refused.received, refused.enrolled, refused.rejected) == (1, 0, 1)
        [error] = refused.errors
        assert (error.sequence, error.subject_id) == (5, subject_id)
        assert error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
        assert "forgotten" in error.message
        assert who(people, hand, palm) is None
    # One that names a later time means the people who were forgotten until then, too.
    accepted = enrol_from_list(after_forget=timestamp(time.time() + 60))
    assert (accepted.enrolled, accepted.rejected) == (1, 0)
    people.templates[subject_id] = palms
    assert who(people, hand, palm) == subject_id
