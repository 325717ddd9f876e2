#!/usr/bin/env python3
"""A payment terminal and a turnstile that use Thenar: an example to copy from.

Needs the stubs that grpcio-tools makes from proto/ on PYTHONPATH; README.md beside this file says
how. Works with embeddings and decisions; does not capture palms itself.

The exit code is 0 if somebody was matched or the write was done, 1 otherwise.
"""

import argparse
import queue
import random
import sys
import time
import uuid

import grpc
import numpy as np
from thenar.v1 import enrollment_pb2, enrollment_pb2_grpc
from thenar.v1 import identification_pb2, identification_pb2_grpc
from thenar.v1 import palm_pb2

# How long a person at a terminal waits for an answer.
ANSWER_WITHIN_S = 2.0
# How long a call that is refused with "not now" is repeated.
PATIENCE_S = 10.0
NOT_NOW = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


def sample(values, hand=palm_pb2.HAND_UNSPECIFIED):
    """One capture of a palm. The server normalises it to unit length."""
    return palm_pb2.PalmSample(embedding=palm_pb2.Embedding(values=values), hand=hand)


class Terminal:
    """A payment terminal at `venue_id`: one call per customer."""

    def __init__(self, channel, venue_id):
        self.identification = identification_pb2_grpc.IdentificationStub(channel)
        self.enrollment = enrollment_pb2_grpc.EnrollmentStub(channel)
        self.venue_id = venue_id

    def enrol(self, subject_id, samples):
        """Enrols a person with one sample or more; returns once the next search finds them."""
        request = enrollment_pb2.EnrollRequest(
            request_id=f"enrol-{uuid.uuid4()}", subject_id=subject_id, samples=samples
        )
        return self._patiently(self.enrollment.Enroll, request).subject

    def forget(self, subject_id):
        """Deletes a person; returns the number of templates that no longer exist."""
        request = enrollment_pb2.ForgetRequest(request_id=f"forget-{uuid.uuid4()}", subject_id=subject_id)
        return self._patiently(self.enrollment.Forget, request).templates_erased

    def pay(self, samples):
        """Asks who pays. With both palms of one person the answer is more certain."""
        request = identification_pb2.IdentifyRequest(
            request_id=f"pay-{uuid.uuid4()}",
            venue_id=self.venue_id,
            purpose=identification_pb2.PURPOSE_PAYMENT,
            probes=samples,
            max_candidates=3,
        )
        return self._patiently(self.identification.Identify, request)

    def _patiently(self, call, request):
        """Repeats a call until it is accepted. The request_id stays the same, so a write happens once."""
        until, pause_s = time.monotonic() + PATIENCE_S, 0.02
        while True:
            try:
                return call(request, timeout=ANSWER_WITHIN_S)
            except grpc.RpcError as error:
                if error.code() not in NOT_NOW or time.monotonic() + pause_s > until:
                    raise
            # Random pauses, so that terminals that were refused together do not retry together.
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, 1.0)


class Gate:
    """A turnstile at `venue_id`: one stream while it is open."""

    def __init__(self, channel, venue_id):
        self.venue_id = venue_id
        self._requests = queue.Queue()
        self._answers = identification_pb2_grpc.IdentificationStub(channel).IdentifyStream(
            iter(self._requests.get, None)
        )

    def show(self, probe):
        """Asks who shows this palm: the subject_id to let through, or None for nobody."""
        request_id = f"gate-{uuid.uuid4()}"
        self._requests.put(
            identification_pb2.IdentifyRequest(
                request_id=request_id,
                venue_id=self.venue_id,
                purpose=identification_pb2.PURPOSE_ENTRY,
                probes=[probe],
                max_candidates=1,
            )
        )
        answer = next(self._answers)
        # One request at a time, so this is its answer. A turnstile with several requests in flight keeps
        # them in a dictionary by request_id: answers may come in another order.
        assert answer.request_id == request_id
        if answer.WhichOneof("outcome") == "error":
            # This palm was not searched; the stream stays open. The turnstile asks for the palm again.
            print(f"not searched: {answer.error.message}", file=sys.stderr)
            return None
        if answer.response.decision != identification_pb2.DECISION_MATCH:
            return None
        return answer.response.candidates[0].subject_id

    def close(self):
        """Ends the requests, and waits for the server to end the stream."""
        self._requests.put(None)
        for _ in self._answers:
            pass


def channel_to(args):
    """A connection; with mutual TLS beyond loopback."""
    if not args.ca:
        return grpc.insecure_channel(args.server)
    read = lambda path: open(path, "rb").read() if path else None
    credentials = grpc.ssl_channel_credentials(read(args.ca), read(args.key), read(args.cert))
    return grpc.secure_channel(args.server, credentials)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", default="127.0.0.1:7600", metavar="HOST:PORT")
    parser.add_argument("--venue", default="example-store", help="where this device stands")
    parser.add_argument("--ca", help="authority that signed the server's certificate (PEM)")
    parser.add_argument("--cert", help="this device's certificate (PEM)")
    parser.add_argument("--key", help="private key of --cert (PEM)")
    actions = parser.add_subparsers(dest="action", required=True)
    enrol = actions.add_parser("enrol", help="enrol a person")
    enrol.add_argument("subject_id")
    enrol.add_argument("left", help="embedding of the left palm (.npy)")
    enrol.add_argument("right", nargs="?", help="embedding of the right palm (.npy)")
    pay = actions.add_parser("pay", help="ask who pays")
    pay.add_argument("palms", nargs="+", help="captures of one person's palms (.npy)")
    gate = actions.add_parser("gate", help="let people through, one palm after another")
    gate.add_argument("palms", nargs="+", help="captures (.npy)")
    forget = actions.add_parser("forget", help="delete a person")
    forget.add_argument("subject_id")
    args = parser.parse_args()

    with channel_to(args) as channel:
        terminal = Terminal(channel, args.venue)
        if args.action == "enrol":
            samples = [sample(np.load(args.left), palm_pb2.HAND_LEFT)]
            if args.right:
                samples.append(sample(np.load(args.right), palm_pb2.HAND_RIGHT))
            subject = terminal.enrol(args.subject_id, samples)
            print(f"{subject.subject_id} enrolled with {len(subject.templates)} palms")
            return 0
        if args.action == "forget":
            print(f"{args.subject_id} forgotten, {terminal.forget(args.subject_id)} palms erased")
            return 0
        if args.action == "pay":
            answer = terminal.pay([sample(np.load(path)) for path in args.palms])
            print(identification_pb2.Decision.Name(answer.decision))
            for candidate in answer.candidates:
                print(f"{candidate.rank}. {candidate.subject_id} {candidate.score:.4f}")
            return 0 if answer.decision == identification_pb2.DECISION_MATCH else 1
        through = []
        turnstile = Gate(channel, args.venue)
        for path in args.palms:
            through.append(turnstile.show(sample(np.load(path))))
            print(through[-1] or "stays outside", flush=True)
        turnstile.close()
        return 0 if all(through) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except grpc.RpcError as error:
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        sys.exit(1)
