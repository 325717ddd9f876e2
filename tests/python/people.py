"""The gallery as a client knows it, and the answers that numpy gives over it.

Palms are random directions: two people score 0 on average with a deviation of 1/sqrt(DIM), and a
new capture of a palm 0.89. Nothing here comes from the server.
"""

import itertools
import uuid

import numpy as np
from thenar.v1 import enrollment_pb2, identification_pb2
from thenar.v1.identification_pb2 import PURPOSE_ENTRY
from thenar.v1.palm_pb2 import HAND_LEFT, HAND_RIGHT, HAND_UNSPECIFIED, Embedding, PalmSample

DIM = 96
# A stored row is rounded to half precision, 2^-11 of its length at most; the rotation of the
# probe adds a little of single precision.
SCORE_TOLERANCE = 2**-11 + 1e-5
TIMEOUT_S = 30.0


def unit(vector):
    return vector / np.linalg.norm(vector)


def sample(vector, hand=HAND_UNSPECIFIED):
    return PalmSample(embedding=Embedding(values=vector), hand=hand)


def fresh_id(prefix="request"):
    return f"{prefix}-{uuid.uuid4()}"


def identify_request(probes, **fields):
    fields = {"venue_id": "gate-1", "purpose": PURPOSE_ENTRY, "max_candidates": 5, **fields}
    return identification_pb2.IdentifyRequest(request_id=fresh_id(), probes=probes, **fields)


def enroll_request(subject_id, palms):
    samples = [sample(vector, hand) for hand, vector in palms]
    return enrollment_pb2.EnrollRequest(request_id=fresh_id("enrol"), subject_id=subject_id, samples=samples)


class People:
    """Who is enrolled: subject_id to a list of (hand, unit vector in double precision)."""

    def __init__(self, client, dice):
        self.client = client
        self.rng = np.random.default_rng(dice.getrandbits(64))
        self.templates = {}
        self._number = itertools.count(1)

    def palm(self):
        return unit(self.rng.standard_normal(DIM))

    def capture(self, palm):
        """A new capture: 0.89 on average."""
        return unit(palm + 0.5 * unit(self.rng.standard_normal(DIM)))

    def new(self, hands=(HAND_LEFT,)):
        """A person who is not enrolled yet."""
        return f"person-{next(self._number):05}", [(hand, self.palm()) for hand in hands]

    def enrol(self, hands=(HAND_LEFT,), palms=None):
        """Enrols a person alone; gives the subject_id and the palms."""
        subject_id, made = self.new(hands)
        palms = palms or made
        self.client.enrollment.Enroll(enroll_request(subject_id, palms), timeout=TIMEOUT_S)
        self.templates[subject_id] = palms
        return subject_id, palms

    def enrol_many(self, count):
        """Enrols in bulk; every fifth person with both hands. Gives the last progress."""
        made = [self.new((HAND_LEFT, HAND_RIGHT) if n % 5 == 0 else (HAND_LEFT,)) for n in range(count)]
        items = [
            enrollment_pb2.BulkEnrollItem(sequence=n, enrollment=enroll_request(*person))
            for n, person in enumerate(made)
        ]
        messages = (enrollment_pb2.BulkEnrollRequest(items=items[at : at + 64]) for at in range(0, count, 64))
        *_, progress = self.client.enrollment.BulkEnroll(messages, timeout=TIMEOUT_S)
        assert progress.enrolled == count, progress
        self.templates.update(made)
        return progress

    def forget(self, subject_id):
        request = enrollment_pb2.ForgetRequest(request_id=fresh_id("forget"), subject_id=subject_id)
        answer = self.client.enrollment.Forget(request, timeout=TIMEOUT_S)
        del self.templates[subject_id]
        return answer

    def identify(self, probes, **fields):
        return self.client.identification.Identify(identify_request(probes, **fields), timeout=TIMEOUT_S)

    def count(self):
        return sum(map(len, self.templates.values()))

    def score(self, subject_id, probes):
        """The fused score by brute force, and how many probes could be compared; None for none."""
        best = []
        for hand, probe in probes:
            scores = [
                float(np.dot(unit(np.asarray(probe, dtype=np.float64)), vector))
                for other, vector in self.templates[subject_id]
                if hand == other or HAND_UNSPECIFIED in (hand, other)
            ]
            if scores:
                best.append(max(scores))
        return (sum(best) / len(best), len(best)) if best else None

    def ranking(self, probes, among=None):
        """Everybody (or of `among`) who can be compared with `probes`, best first: (score, subject_id)."""
        scored = ((self.score(subject_id, probes), subject_id) for subject_id in among or self.templates)
        return sorted(((score[0], subject_id) for score, subject_id in scored if score), reverse=True)

    def check_ranking(self, probes, answer, count, among=None):
        """The answer lists the `count` best of the gallery (or of `among`), each with its score, by rank."""
        expected = self.ranking(probes, among)[:count]
        assert len(answer.candidates) == len(expected)
        assert [candidate.rank for candidate in answer.candidates] == list(range(1, len(expected) + 1))
        assert len({candidate.subject_id for candidate in answer.candidates}) == len(expected)
        for candidate, (score, subject_id) in zip(answer.candidates, expected):
            own, compared = self.score(candidate.subject_id, probes)
            assert abs(candidate.score - own) <= SCORE_TOLERANCE, (candidate, own)
            # Two who are closer than rounding may change places, no others.
            assert candidate.subject_id == subject_id or abs(own - score) <= 2 * SCORE_TOLERANCE, (candidate, subject_id)
            assert candidate.probes_compared == compared
