"""Python's grpcio as an independent peer of the end-to-end suites: server and client of grpc.testing.TestService, the
service of gRPC's own interoperability cases, so that either end can be exchanged for gRPC's Go programs.

    grpc_peer.py serve PORT
    grpc_peer.py CASE HOST:PORT

Cases, metadata keys and sizes are those of gRPC's "Interoperability Test Case Descriptions"; `many_calls` is ours. The
client exits with 0 if it saw what it should. The messages are built here, so that no compiler of .proto files is needed.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "grpc.testing.TestService"
# Nothing that a client does may hang longer, in seconds.
LIMIT = 30
ECHO_INITIAL = "x-grpc-test-echo-initial"
ECHO_TRAILING = "x-grpc-test-echo-trailing-bin"
MANY = 200

_FIELD = descriptor_pb2.FieldDescriptorProto
# Message -> fields: name, number, type (a message's name, or a scalar), repeated.
MESSAGES = {
    "Empty": [],
    "Payload": [("body", 2, _FIELD.TYPE_BYTES, False)],
    "EchoStatus": [("code", 1, _FIELD.TYPE_INT32, False), ("message", 2, _FIELD.TYPE_STRING, False)],
    "ResponseParameters": [("size", 1, _FIELD.TYPE_INT32, False)],
    "SimpleRequest": [
        ("response_size", 2, _FIELD.TYPE_INT32, False),
        ("payload", 3, "Payload", False),
        ("response_status", 7, "EchoStatus", False),
    ],
    "SimpleResponse": [("payload", 1, "Payload", False)],
    "StreamingInputCallRequest": [("payload", 1, "Payload", False)],
    "StreamingInputCallResponse": [("aggregated_payload_size", 1, _FIELD.TYPE_INT32, False)],
    "StreamingOutputCallRequest": [
        ("response_parameters", 2, "ResponseParameters", True),
        ("payload", 3, "Payload", False),
        ("response_status", 7, "EchoStatus", False),
    ],
    "StreamingOutputCallResponse": [("payload", 1, "Payload", False)],
}


def _messages():
    file = descriptor_pb2.FileDescriptorProto(name="test.proto", package="grpc.testing", syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                added.type, added.type_name = _FIELD.TYPE_MESSAGE, f".grpc.testing.{kind}"
            else:
                added.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = (pool.FindMessageTypeByName(f"grpc.testing.{name}") for name in MESSAGES)
    return {descriptor.name: message_factory.GetMessageClass(descriptor) for descriptor in found}


M = _messages()
# Method -> request, response, whether each streams.
METHODS = {
    "EmptyCall": ("Empty", "Empty", False, False),
    "UnaryCall": ("SimpleRequest", "SimpleResponse", False, False),
    "StreamingOutputCall": ("StreamingOutputCallRequest", "StreamingOutputCallResponse", False, True),
    "StreamingInputCall": ("StreamingInputCallRequest", "StreamingInputCallResponse", True, False),
    "FullDuplexCall": ("StreamingOutputCallRequest", "StreamingOutputCallResponse", True, True),
}


def payload(size):
    return M["Payload"](body=bytes(size))


# --- the server


def echo_metadata(context):
    for key, value in context.invocation_metadata():
        if key == ECHO_INITIAL:
            context.send_initial_metadata(((key, value),))
        if key == ECHO_TRAILING:
            context.set_trailing_metadata(((key, value),))


def echo_status(request, context):
    if request.HasField("response_status") and request.response_status.code != 0:
        code = next(code for code in grpc.StatusCode if code.value[0] == request.response_status.code)
        context.abort(code, request.response_status.message)


def empty_call(_request, context):
    echo_metadata(context)
    return M["Empty"]()


def unary_call(request, context):
    echo_metadata(context)
    echo_status(request, context)
    return M["SimpleResponse"](payload=payload(request.response_size))


def outputs(request, context):
    for parameters in request.response_parameters:
        yield M["StreamingOutputCallResponse"](payload=payload(parameters.size))
    echo_status(request, context)


def streaming_output_call(request, context):
    echo_metadata(context)
    yield from outputs(request, context)


def streaming_input_call(requests, context):
    echo_metadata(context)
    total = sum(len(request.payload.body) for request in requests)
    return M["StreamingInputCallResponse"](aggregated_payload_size=total)


def full_duplex_call(requests, context):
    echo_metadata(context)
    for request in requests:
        yield from outputs(request, context)


HANDLERS = {
    "EmptyCall": empty_call,
    "UnaryCall": unary_call,
    "StreamingOutputCall": streaming_output_call,
    "StreamingInputCall": streaming_input_call,
    "FullDuplexCall": full_duplex_call,
}


def serve(port):
    handlers = {}
    for name, (request, response, streams_in, streams_out) in METHODS.items():
        arity = f"{'stream' if streams_in else 'unary'}_{'stream' if streams_out else 'unary'}"
        make = getattr(grpc, f"{arity}_rpc_method_handler")
        handlers[name] = make(HANDLERS[name], M[request].FromString, M[response].SerializeToString)
    server = grpc.server(ThreadPoolExecutor(16))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(f"[::]:{port}")
    server.start()
    server.wait_for_termination()


# --- the client


class Failure(Exception):
    """Something was not as it should be."""


def expect(seen, wanted, what):
    if seen != wanted:
        raise Failure(f"{what}: {seen!r} instead of {wanted!r}")


class Client:
    """The methods of the service as functions."""

    def __init__(self, channel):
        for name, (request, response, streams_in, streams_out) in METHODS.items():
            arity = f"{'stream' if streams_in else 'unary'}_{'stream' if streams_out else 'unary'}"
            serialize, parse = M[request].SerializeToString, M[response].FromString
            setattr(self, name, getattr(channel, arity)(f"/{SERVICE}/{name}", serialize, parse))
        empty = M["Empty"]
        self.Unimplemented = channel.unary_unary(
            f"/{SERVICE}/UnimplementedCall", empty.SerializeToString, empty.FromString
        )


def output_request(size, sent=0, **more):
    return M["StreamingOutputCallRequest"](
        response_parameters=[M["ResponseParameters"](size=size)], payload=payload(sent), **more
    )


def empty_unary(client):
    expect(client.EmptyCall(M["Empty"](), timeout=LIMIT), M["Empty"](), "the answer")


def large_unary(client):
    request = M["SimpleRequest"](response_size=314159, payload=payload(271828))
    expect(client.UnaryCall(request, timeout=LIMIT).payload.body, bytes(314159), "the payload")


def client_streaming(client):
    requests = (M["StreamingInputCallRequest"](payload=payload(size)) for size in (27182, 8, 1828, 45904))
    expect(client.StreamingInputCall(requests, timeout=LIMIT).aggregated_payload_size, 74922, "the sum")


def server_streaming(client):
    sizes = [31415, 9, 2653, 58979]
    parameters = [M["ResponseParameters"](size=size) for size in sizes]
    request = M["StreamingOutputCallRequest"](response_parameters=parameters)
    seen = [len(answer.payload.body) for answer in client.StreamingOutputCall(request, timeout=LIMIT)]
    expect(seen, sizes, "the answers")


class Turns:
    """Requests of a conversation: the next one is handed out only when somebody says it."""

    def __init__(self):
        import queue

        self._queue = queue.Queue(1)

    def say(self, request):
        self._queue.put(request, timeout=LIMIT)

    def __iter__(self):
        return iter(lambda: self._queue.get(timeout=LIMIT), None)


def ping_pong(client):
    turns = Turns()
    answers = client.FullDuplexCall(iter(turns), timeout=LIMIT)
    for size, sent in ((31415, 27182), (9, 8), (2653, 1828), (58979, 45904)):
        turns.say(output_request(size, sent))
        expect(len(next(answers).payload.body), size, "the answer")
    turns.say(None)
    expect(list(answers), [], "answers after the end")


def empty_stream(client):
    expect(list(client.FullDuplexCall(iter(()), timeout=LIMIT)), [], "the answers")


def custom_metadata(client):
    initial, trailing = "test_initial_metadata_value", b"\xab\xab\xab"
    metadata = ((ECHO_INITIAL, initial), (ECHO_TRAILING, trailing))
    request = M["SimpleRequest"](response_size=314159, payload=payload(271828))
    _, unary = client.UnaryCall.with_call(request, metadata=metadata, timeout=LIMIT)
    duplex = client.FullDuplexCall(iter([output_request(314159, 271828)]), metadata=metadata, timeout=LIMIT)
    expect(len(list(duplex)), 1, "the count of answers")
    for call in (unary, duplex):
        expect(dict(call.initial_metadata()).get(ECHO_INITIAL), initial, "the initial metadata")
        expect(dict(call.trailing_metadata()).get(ECHO_TRAILING), trailing, "the trailing metadata")


def fails(call, code, details=None):
    """Runs a call that has to fail with this status."""
    try:
        call()
    except grpc.RpcError as error:
        expect(error.code(), code, "the status")
        if details is not None:
            expect(error.details(), details, "the message")
        return
    raise Failure(f"the call succeeded, it should have failed with {code}")


def status(client, message):
    echoed = M["EchoStatus"](code=2, message=message)
    request = M["SimpleRequest"](response_status=echoed)
    fails(lambda: client.UnaryCall(request, timeout=LIMIT), grpc.StatusCode.UNKNOWN, message)
    request = M["StreamingOutputCallRequest"](response_status=echoed)
    stream = lambda: list(client.FullDuplexCall(iter([request]), timeout=LIMIT))
    fails(stream, grpc.StatusCode.UNKNOWN, message)


def status_code_and_message(client):
    status(client, "test status message")


def special_status_message(client):
    status(client, "\t\ntest with whitespace\r\nand Unicode BMP \u263a and non-BMP \U0001f608\t\n")


def unimplemented_method(client):
    fails(lambda: client.Unimplemented(M["Empty"](), timeout=LIMIT), grpc.StatusCode.UNIMPLEMENTED)


def timeout_on_sleeping_server(client):
    turns = Turns()
    turns.say(output_request(31415, 27182))
    fails(lambda: list(client.FullDuplexCall(iter(turns), timeout=0.001)), grpc.StatusCode.DEADLINE_EXCEEDED)


def cancel_after_first_response(client):
    turns = Turns()
    answers = client.FullDuplexCall(iter(turns), timeout=LIMIT)
    turns.say(output_request(31415, 27182))
    expect(len(next(answers).payload.body), 31415, "the answer")
    answers.cancel()
    fails(lambda: list(answers), grpc.StatusCode.CANCELLED)
    turns.say(None)


def many_calls(client):
    """Calls one after the other, then at once, on one channel."""

    def one(i):
        request = M["SimpleRequest"](response_size=i * 100, payload=payload(i * 50))
        expect(len(client.UnaryCall(request, timeout=LIMIT).payload.body), i * 100, f"answer {i}")

    for i in range(MANY):
        one(i)
    with ThreadPoolExecutor(20) as threads:
        for _ in threads.map(one, range(MANY)):
            pass


CASES = [
    empty_unary, large_unary, client_streaming, server_streaming, ping_pong, empty_stream, custom_metadata,
    status_code_and_message, special_status_message, unimplemented_method, timeout_on_sleeping_server,
    cancel_after_first_response, many_calls,
]  # fmt: skip


def main():
    what, where = sys.argv[1:]
    if what == "serve":
        serve(where)
        return
    case = next(case for case in CASES if case.__name__ == what)
    with grpc.insecure_channel(where) as channel:
        try:
            case(Client(channel))
        except (Failure, grpc.RpcError) as error:
            sys.exit(f"grpc_peer.py: {what}: {error}")


if __name__ == "__main__":
    main()
