"""Every message of the protocol, as no good agent fills it in: each is answered, or refused with a reason."""

import itertools
import math
import string
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ecavg.common import rpc, tls
from ecavg.common.errors import Reason
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.protocol import SPOKEN
from tests.hostile.target import CALL_SECONDS, Agent, Target, digest_of, header, refusal_of, shard

SERVICE = pb.DESCRIPTOR.services_by_name["ECAvg"]
METHODS = {method.name: method for method in SERVICE.methods}
REASONS = {reason.value for reason in Reason} - {Reason.INTERNAL.value}
PER_METHOD = 100  # examples of Hypothesis
DIGEST = digest_of(b"")
SMALL = shard(4, first_pixel=1 << 22)


def request_of(method: str) -> Any:
    return getattr(pb, METHODS[method].input_type.name)


def answer(agent: Agent, method: str, *requests: Any) -> Reason | None:
    """Make a call with messages or any bytes, and return the reason of the refusal; None if it succeeded."""
    found = METHODS[method]
    ways = ("stream" if way else "unary" for way in (found.client_streaming, found.server_streaming))
    make = getattr(agent.channel, "_".join(ways))
    call = make(f"/{SERVICE.full_name}/{method}", _bytes_of)
    try:
        reply = call(iter(requests) if found.client_streaming else requests[0], timeout=30)
        if found.server_streaming:
            next(reply)
            reply.cancel()
    except StopIteration:
        pass
    except grpc.RpcError as error:
        broken: Any = error
        reason = dict(broken.trailing_metadata() or ()).get(rpc.REASON_KEY)
        assert reason in REASONS, f"{method} of {requests!r}: {broken}"
        assert broken.details().isprintable()
        return Reason(reason)
    return None


def _bytes_of(request: Any) -> bytes:
    return request if isinstance(request, bytes) else bytes(request.SerializeToString())


# ---------------------------------------------------------------------- texts

NASTY = (
    "../../evil", "..", ".", "/", "/tmp/evil", "~/evil", "..\\..\\evil", "C:\\evil", "%2e%2e%2fevil",
    "evil\0", "a" * 64 + "/../evil", "0" * 63 + "/", "0" * 64 + "\n", "0" * 64 + "/../evil",
    "０" * 64, "A" * 64, "0" * 65, "evil\r\nevent=ready", "\x1b[2J\x1b]0;evil\x07", "<script>evil()</script>",
    "'; DROP TABLE agents; --", "{{7*7}}", "${jndi:evil}", "\u202eevil", "\ufeff", "file:///etc/passwd",
    "/proc/self/mem", "x" * 100_000,
)  # fmt: skip


def texts_of(message: Descriptor, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths to all the fields of a message that hold text."""
    for field in message.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            yield (*path, field.name)
        elif field.message_type:
            yield from texts_of(field.message_type, (*path, field.name))


TEXTS = [(method, path) for method in METHODS for path in texts_of(METHODS[method].input_type)]


@pytest.mark.parametrize(
    ("method", "path"), TEXTS, ids=lambda each: each if isinstance(each, str) else ".".join(each)
)
def test_no_text_is_ever_a_path(target: Target, attacker: Agent, method: str, path: tuple[str, ...]) -> None:
    good = {
        "Join": pb.JoinRequest(protocol_version=SPOKEN.newest),
        "QueryUpload": pb.QueryUploadRequest(digest=DIGEST, kind=pb.BLOB_KIND_DATA),
        "Upload": header(SMALL, "data"),
        "Contribute": pb.ContributeRequest(
            round=1, weights_digest=DIGEST, num_examples=4, initial_weights_digest=target.initial_digest
        ),
        "Download": pb.DownloadRequest(digest=target.initial_digest),
        "Report": pb.ReportRequest(round=1, score_after=0.5),
    }[method]
    before = {file for file in target.cluster.folder.rglob("*") if "blobs" not in file.parts}
    for text in NASTY:
        request = type(good).FromString(good.SerializeToString())
        parent = request
        for name in path[:-1]:
            parent = getattr(parent, name)
        if parent.DESCRIPTOR.fields_by_name[path[-1]].is_repeated:
            getattr(parent, path[-1]).append(text)
        else:
            setattr(parent, path[-1], text)
        # A text that can be shown may be the name of a class, and is refused as one that the run has not.
        expected = {Reason.MALFORMED_REQUEST} | ({Reason.CLASS_NAMES} if method == "Join" else set())
        assert answer(attacker, method, request) in expected, text
    assert {file for file in target.cluster.folder.rglob("*") if "blobs" not in file.parts} == before


def test_texts_that_are_no_utf_8_are_refused(target: Target, attacker: Agent) -> None:
    good = pb.DownloadRequest(digest=DIGEST).SerializeToString()
    assert answer(attacker, "Download", good.replace(b"e3", b"\xff\xfe")) is Reason.MALFORMED_REQUEST


# ---------------------------------------------------------------------- numbers and names

CONTRIBUTION = {"round": 1, "weights_digest": DIGEST, "num_examples": 4}
LARGEST = 2**64 - 1


def contribute(**changes: Any) -> tuple[str, Any]:
    return "Contribute", pb.ContributeRequest(**{**CONTRIBUTION, **changes})


def report(**fields: Any) -> tuple[str, Any]:
    return "Report", pb.ReportRequest(**fields)


NUMBERS: dict[str, tuple[tuple[str, Any], Reason]] = {
    "join under another protocol": (
        ("Join", pb.JoinRequest(protocol_version=2**32 - 1)),
        Reason.PROTOCOL_MISMATCH,
    ),
    "join under none": (("Join", pb.JoinRequest()), Reason.PROTOCOL_MISMATCH),
    "round 0": (contribute(round=0), Reason.MALFORMED_REQUEST),
    "round of the far future": (contribute(round=2**32 - 1), Reason.MALFORMED_REQUEST),
    "weights that are not there": (contribute(), Reason.MISSING_BLOB),
    "no examples": (contribute(num_examples=0), Reason.MALFORMED_REQUEST),
    "2^64-1 examples": (contribute(num_examples=LARGEST), Reason.MALFORMED_REQUEST),
    "accuracy that is no number": (contribute(score_local=math.nan), Reason.MALFORMED_REQUEST),
    "accuracy beyond all measure": (contribute(score_local=math.inf), Reason.MALFORMED_REQUEST),
    "one shard twice": (contribute(shard_digests=[DIGEST] * 2), Reason.MALFORMED_REQUEST),
    "too many shards": (
        contribute(shard_digests=[f"{number:064x}" for number in range(10_001)]),
        Reason.MALFORMED_REQUEST,
    ),
    "report on round 0": (report(score_after=0.5), Reason.MALFORMED_REQUEST),
    "report on a round to come": (report(round=2**32 - 1, score_after=0.5), Reason.MALFORMED_REQUEST),
    "report on less than nothing": (report(round=1, score_after=-1e-300), Reason.MALFORMED_REQUEST),
    "report on 2^64-1 images": (report(round=1, num_held_out=LARGEST), Reason.MALFORMED_REQUEST),
    "blob of nobody": (("Download", pb.DownloadRequest(digest=DIGEST)), Reason.UNKNOWN_BLOB),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_senseless_value_is_refused(target: Target, attacker: Agent, name: str) -> None:
    (method, request), reason = NUMBERS[name]
    assert answer(attacker, method, request) is reason


def test_download_from_beyond_the_end_is_refused(target: Target, attacker: Agent) -> None:
    for offset in (1 << 40, LARGEST):
        request = pb.DownloadRequest(digest=target.initial_digest, offset=offset)
        assert answer(attacker, "Download", request) is Reason.OFFSET_MISMATCH


def test_data_are_no_weights_and_weights_no_data(target: Target, attacker: Agent) -> None:
    data = attacker.upload(SMALL, "data")
    request = pb.ContributeRequest(round=1, weights_digest=data, num_examples=4)
    assert answer(attacker, "Contribute", request) is Reason.MISSING_BLOB


# ---------------------------------------------------------------------- requests for certificates


def csr(key: Any, *names: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


REQUESTS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "rubbish": lambda: b"\x30\x82\xff\xff" + bytes(1000),
    "a megabyte of rubbish": lambda: b"\x30\x83\x0f\xff\xfb" + bytes(1 << 20),
    "key of another kind": lambda: csr(rsa.generate_private_key(65537, 2048), "attacker"),
    "key on another curve": lambda: csr(ec.generate_private_key(ec.SECP384R1()), "attacker"),
    "two names": lambda: csr(tls.new_key(), "attacker", "witness"),
    "name that is a path": lambda: csr(tls.new_key(), "../../evil"),
    "name that is a page": lambda: csr(tls.new_key(), "<script>"),
    "signature of another": lambda: csr(tls.new_key(), "attacker")[:-8] + bytes(8),
    "algorithm that nobody has": lambda: csr(tls.new_key(), "attacker").replace(
        bytes.fromhex("2a8648ce3d0201"), bytes.fromhex("2a8648ce3d0209")
    ),
    "curve that nobody has": lambda: csr(tls.new_key(), "attacker").replace(
        bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d03010f")
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_request_for_no_certificate_is_refused(target: Target, attacker: Agent, name: str) -> None:
    request = REQUESTS[name]()
    assert answer(attacker, "Renew", pb.RenewRequest(request=request)) is Reason.MALFORMED_REQUEST
    assert answer(attacker, "Enroll", pb.EnrollRequest(request=request)) is Reason.TOKEN


def test_nobody_renews_for_another(target: Target, attacker: Agent) -> None:
    for name in ("witness", "attacker"):
        request = pb.RenewRequest(request=tls.make_request(tls.new_key(), name))
        assert answer(attacker, "Renew", request) is not None


# ---------------------------------------------------------------------- whatever else

uint32 = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2, 2**31, 2**32 - 1])
uint64 = st.integers(0, LARGEST) | st.sampled_from([0, 1, len(SMALL), 2**32, 2**63 - 1, 2**63, LARGEST])
double = st.floats(0, 1) | st.floats()
digests = st.sampled_from([DIGEST, digest_of(SMALL)]) | st.text(string.hexdigits, min_size=64, max_size=64)
texts = digests | st.sampled_from(NASTY[:-1]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
octets = st.sampled_from([b"", SMALL, SMALL[:100]]) | st.binary(max_size=300)

SCALARS = {
    FieldDescriptor.TYPE_STRING: texts,
    FieldDescriptor.TYPE_BYTES: octets,
    FieldDescriptor.TYPE_UINT32: uint32,
    FieldDescriptor.TYPE_UINT64: uint64,
    FieldDescriptor.TYPE_DOUBLE: double,
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_ENUM: st.integers(-1, 4) | st.integers(-(2**31), 2**31 - 1),
}


def messages(descriptor: Descriptor) -> st.SearchStrategy[Any]:
    """Any message of this kind; each field may be there or not, and only its type is kept to."""
    fields = {}
    for field in descriptor.fields:
        value = messages(field.message_type) if field.message_type else SCALARS[field.type]
        fields[field.name] = st.lists(value, max_size=4) if field.is_repeated else value
    groups = [[field.name for field in group.fields] for group in descriptor.oneofs if len(group.fields) > 1]
    alone = fields.keys() - {name for group in groups for name in group}
    parts = [st.fixed_dictionaries({}, optional={name: fields[name] for name in sorted(alone)})]
    for group in groups:
        parts += [st.one_of(st.just({}), *(st.fixed_dictionaries({name: fields[name]}) for name in group))]
    merged = st.tuples(*parts).map(lambda some: dict(itertools.chain(*(each.items() for each in some))))
    return merged.map(lambda values: getattr(pb, descriptor.name)(**values))


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that are nearly this message."""
    return st.tuples(st.integers(0, max(len(content) - 1, 0)), st.binary(max_size=3)).map(
        lambda change: content[: change[0]] + change[1] + content[change[0] + 1 :]
    )


def requests(method: str) -> st.SearchStrategy[Any]:
    whole = messages(METHODS[method].input_type)
    return (
        whole | whole.flatmap(lambda message: damaged(message.SerializeToString())) | st.binary(max_size=100)
    )


bounded = settings(
    max_examples=PER_METHOD,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "Upload"])
def test_any_request_is_answered_or_refused_with_a_reason(server: Target, method: str) -> None:
    agent = server.agent("anything")

    @bounded
    @given(request=requests(method))
    def check(request: Any) -> None:
        answer(agent, method, request)

    with server.unharmed():
        check()


def test_any_upload_is_answered_or_refused_with_a_reason(server: Target) -> None:
    agent = server.agent("anything")
    good = [header(SMALL, "data"), pb.UploadRequest(chunk=SMALL)]
    any_stream = st.lists(requests("Upload"), max_size=5)
    nearly_good = st.tuples(messages(pb.UploadHeader.DESCRIPTOR), any_stream).map(
        lambda parts: [
            header(SMALL, "data", **{field.name: value for field, value in parts[0].ListFields()}),
            *parts[1],
        ]
    )
    behind_a_good_one = any_stream.map(lambda others: [*good, *others])

    @bounded
    @given(stream=any_stream | nearly_good | behind_a_good_one)
    @example(stream=good)
    def check(stream: list[Any]) -> None:
        answer(agent, "Upload", *stream)

    with server.unharmed(num_partials=PER_METHOD):
        check()


@pytest.mark.parametrize("service", ["grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"])
def test_rubbish_is_refused_by_other_services_too(target: Target, attacker: Agent, service: str) -> None:
    call = attacker.channel.unary_stream if service.endswith("Watch") else attacker.channel.unary_unary
    refused = refusal_of(lambda: list(call(f"/{service}")(b"\xff\xff", timeout=CALL_SECONDS)))  # type: ignore[call-arg]
    assert refused.reason is Reason.MALFORMED_REQUEST


def test_reflection_says_no_to_what_there_is_not(target: Target, attacker: Agent) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(attacker.channel)
    requests = [reflection_pb2.ServerReflectionRequest(file_by_filename=text) for text in NASTY[:-1]]
    replies = list(stub.ServerReflectionInfo(iter(requests), timeout=CALL_SECONDS))
    assert len(replies) == len(requests)
    assert all(reply.HasField("error_response") for reply in replies)


def test_whoever_has_not_joined_is_refused_whatever_he_sends(server: Target) -> None:
    outsider = server.agent("outsider", join=False)
    good: dict[str, Any] = {
        "Watch": pb.WatchRequest(),
        "QueryUpload": pb.QueryUploadRequest(digest=DIGEST, kind=pb.BLOB_KIND_DATA),
        "Upload": header(SMALL, "data"),
        "Contribute": pb.ContributeRequest(**CONTRIBUTION),
        "Download": pb.DownloadRequest(digest=server.initial_digest),
        "Report": pb.ReportRequest(round=1, score_after=0.5),
    }
    with server.unharmed():
        for method, request in good.items():
            assert answer(outsider, method, request) is Reason.UNKNOWN_AGENT
        assert answer(outsider, "Join", pb.JoinRequest(protocol_version=SPOKEN.newest + 1)) is not None
