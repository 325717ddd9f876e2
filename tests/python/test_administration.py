"""What operators and tools see: status, health, reflection, and a server that is full."""

import concurrent.futures
import time

import grpc
import pytest
from conftest import Client
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from people import DIM, TIMEOUT_S, identify_request, sample
from rpc_pb2 import RetryInfo
from test_errors import details
from thenar.v1 import administration_pb2
from thenar.v1.identification_pb2 import DECISION_NO_MATCH

SERVICES = ["thenar.v1.Administration", "thenar.v1.Enrollment", "thenar.v1.Identification"]


def test_the_status_says_what_the_server_is_and_holds(people):
    status = people.client.administration.GetStatus(administration_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
    assert (status.dim, status.templates, status.subjects) == (DIM, people.count(), len(people.templates))
    assert (status.engine.kind, status.engine.threads, status.engine.preferred) == ("cpu", 2, True)
    assert status.version and status.engine.adapter
    assert status.registry_lsn == status.gallery_lsn > 0
    assert status.uptime.ToNanoseconds() > 0
    policies = {policy.purpose: (policy.threshold, policy.margin) for policy in status.policies}
    assert policies["payment"] == (0.62, 0.05)
    assert sorted(policies) == ["entry", "loyalty", "payment", "workplace"]
    before = status.searches
    people.identify([sample(people.palm())])
    status = people.client.administration.GetStatus(administration_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
    assert status.searches == before + 1


def test_every_service_is_healthy_and_an_unknown_one_is_not_found(server):
    with server.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ["", *SERVICES]:
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, service
        with pytest.raises(grpc.RpcError) as refused:
            health.Check(health_pb2.HealthCheckRequest(service="thenar.v1.Nothing"), timeout=TIMEOUT_S)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services_with_all_their_calls(server):
    with server.channel() as channel:
        reflection = ProtoReflectionDescriptorDatabase(channel)
        listed = reflection.get_services()
        assert set(SERVICES) <= set(listed)
        assert "grpc.health.v1.Health" in listed
        pool = DescriptorPool(reflection)
        calls = {service: [m.name for m in pool.FindServiceByName(service).methods] for service in SERVICES}
        assert calls == {
            "thenar.v1.Administration": ["GetStatus"],
            "thenar.v1.Enrollment": ["Enroll", "BulkEnroll", "GetSubject", "UpdateSubject", "Forget"],
            "thenar.v1.Identification": ["Identify", "IdentifyStream", "Verify"],
        }
        request = pool.FindMessageTypeByName("thenar.v1.IdentifyRequest")
        assert request.fields_by_name["max_candidates"].number == 5


def test_a_full_queue_is_said_at_once_with_a_time_to_come_back(start, people):
    server = start(more="[batch]\nqueue_max = 1\n")
    with server.channel() as crowd_channel, server.channel() as channel:
        crowd, caller = Client(crowd_channel), Client(channel)
        stop = concurrent.futures.Future()

        def requests():
            while not stop.done():
                yield identify_request([sample(people.palm())] * 4, max_candidates=100, threshold=-1.0)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            # A gate that asks as fast as it can, 64 requests at a time, for a queue of one.
            on_stream, at_caller = [], []
            answers = crowd.identification.IdentifyStream(requests(), timeout=120)
            reading = pool.submit(lambda: on_stream.extend(a.error for a in answers if a.WhichOneof("outcome") == "error"))
            until = time.monotonic() + 60
            try:
                while not (on_stream and at_caller) and time.monotonic() < until:
                    try:
                        caller.identification.Identify(identify_request([sample(people.palm())]), timeout=TIMEOUT_S)
                    except grpc.RpcError as refused:
                        at_caller.append(refused)
            finally:
                stop.set_result(None)
            reading.result(timeout=60)
        assert at_caller and on_stream, "a queue of one was never full"
        for refused in at_caller:
            assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            [detail] = details(refused).details
            retry = RetryInfo()
            assert detail.Unpack(retry)
            assert 0.001 <= retry.retry_delay.ToNanoseconds() / 1e9 <= 5
        for refused in on_stream:
            assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert 0.001 <= refused.retry_after.ToNanoseconds() / 1e9 <= 5
        # And when the crowd has gone, it is answered again.
        answer = caller.identification.Identify(identify_request([sample(people.palm())]), timeout=TIMEOUT_S)
        assert answer.decision == DECISION_NO_MATCH
