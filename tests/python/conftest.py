"""A Python client against the real server: what is generated from proto/ must be enough.

The stubs are made anew for every run, into a folder that goes with it. One server serves most
tests; `People` keeps the truth about its gallery, and numpy says what it should answer.

THENAR_BIN names the program under test; without it, target/debug/thenar.
"""

import itertools
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile

import grpc
import pytest
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("THENAR_BIN", ROOT / "target" / "debug" / "thenar")).resolve()

# Nothing is compiled into the source tree, and modules of the tests find the stubs by import.
sys.dont_write_bytecode = True
_generated = tempfile.TemporaryDirectory(prefix="thenar-stubs-")
STUBS = pathlib.Path(_generated.name)


def generate():
    """Runs protoc as a client's author would."""
    proto = ROOT / "proto"
    rpc = ROOT / "tests" / "python"
    well_known = pathlib.Path(protoc.__file__).parent / "_proto"
    files = sorted(proto.rglob("*.proto")) + [rpc / "rpc.proto"]
    arguments = ["protoc", f"-I{proto}", f"-I{rpc}", f"-I{well_known}"]
    arguments += [f"--python_out={STUBS}", f"--grpc_python_out={STUBS}", *map(str, files)]
    assert protoc.main(arguments) == 0, "protoc cannot read proto/"


generate()
sys.path.insert(0, str(STUBS))

from people import DIM, People  # noqa: E402 (needs the stubs)
from thenar.v1 import administration_pb2_grpc, enrollment_pb2_grpc, identification_pb2_grpc  # noqa: E402


class Server:
    """A server process with a folder, a key and a port of its own."""

    def __init__(self, folder, top="", more=""):
        self.folder = folder
        key, config = folder / "master.key", folder / "thenar.toml"
        environment = {k: v for k, v in os.environ.items() if k not in ("THENAR_MASTER_KEY", "CREDENTIALS_DIRECTORY")}
        environment["NO_COLOR"] = "1"
        made = subprocess.run(
            [BINARY, "keys", "generate", "--out", key], capture_output=True, text=True, timeout=60, env=environment
        )
        assert made.returncode == 0, made.stderr
        config.write_text(
            f'data = "{folder / "data"}"\nkey_file = "{key}"\ndim = {DIM}\n{top}'
            '[server]\nlisten = "127.0.0.1:0"\n[metrics]\nlisten = "off"\n'
            '[engine]\nkind = "cpu"\nthreads = 2\n[storage]\nreserve_mib = 1\n' + more
        )
        self.log = open(folder / "log", "w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [BINARY, "serve", "--config", config],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        ready = self.process.stdout.readline()
        prefix = "thenar listening on "
        if not ready.startswith(prefix):
            self.process.kill()
            self.process.wait()
            pytest.fail(f"the server did not start: {ready!r}\n{self.said()}")
        self.address = ready.removeprefix(prefix).strip()

    def said(self):
        self.log.flush()
        return (self.folder / "log").read_text(encoding="utf-8")

    def channel(self):
        return grpc.insecure_channel(self.address)

    def stop(self):
        """A clean end: asked to stop, it answers what is in flight and exits with 0."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = "none in 60 s"
        self.process.stdout.close()
        said = self.said()
        self.log.close()
        assert code == 0, f"exit code {code}:\n{said}"


class Client:
    """The three services on one connection."""

    def __init__(self, channel):
        self.channel = channel
        self.identification = identification_pb2_grpc.IdentificationStub(channel)
        self.enrollment = enrollment_pb2_grpc.EnrollmentStub(channel)
        self.administration = administration_pb2_grpc.AdministrationStub(channel)


@pytest.fixture(scope="session")
def start():
    """Starts servers; all are stopped at the end of the run."""
    with tempfile.TemporaryDirectory(prefix="thenar-py-") as folder:
        servers, number = [], itertools.count()

        def start(top="", more=""):
            place = pathlib.Path(folder) / str(next(number))
            place.mkdir(mode=0o700)
            servers.append(Server(place, top, more))
            return servers[-1]

        yield start
        for server in servers:
            server.stop()


@pytest.fixture(scope="session")
def server(start):
    return start()


@pytest.fixture(scope="session")
def client(server):
    with server.channel() as channel:
        yield Client(channel)


@pytest.fixture(scope="session")
def people(client):
    """200 people, enrolled in bulk, and the truth about them. Tests that change it say so to it."""
    people = People(client, random.Random(20))
    people.enrol_many(200)
    return people


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """A failing test shows the end of its server's log."""
    outcome = yield
    report = outcome.get_result()
    server = item.funcargs.get("server") if hasattr(item, "funcargs") else None
    if report.failed and server is not None:
        report.sections.append(("the server's log", server.said()[-4000:]))
