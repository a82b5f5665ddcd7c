"""Assistants as real clients, before a stand-in of their model on this machine: no provider is ever asked.

The test is the model: each request for it is held until the test says which tool
to call next, so that a broker may be killed between two calls of one conversation.
What else an assistant wants from outside goes to a proxy that refuses it.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pty
import queue
import re
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rigs.client_rig import ClientFailed, Program, end_group, person_environment, run_program, visits

ANSWER_LIMIT = 90.0
LOGIN_LIMIT = 60.0
CONNECT_LIMIT = 20.0
Event = tuple[str, dict[str, Any]]


def tool_name(body: dict[str, Any], wanted: str) -> dict[str, str] | None:
    """{"name"} of the tool as this assistant calls it, with its {"namespace"} where it has one.

    None if it is not listed.
    """
    for tool in body.get("tools", []):
        listed = tool.get("name") or tool.get("function", {}).get("name", "")
        for inner in tool.get("tools", []):
            if inner.get("name") == wanted:
                return {"name": wanted, "namespace": listed}
        if listed == wanted or listed.endswith(("__" + wanted, "-" + wanted)):
            return {"name": listed}
    return None


# -- the three forms in which models are spoken to: what a
# call of a tool looks like, and where its result stands


def responses_call(body: dict[str, Any], call: str, name: dict[str, str], arguments: str) -> list[Event]:
    item = {"type": "function_call", "id": "fc_" + call, "call_id": call, "arguments": arguments, **name}
    return responses_events([item])


def responses_end(_body: dict[str, Any]) -> list[Event]:
    text = {"type": "output_text", "text": "Done.", "annotations": []}
    item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [text]}
    return responses_events([item])


def responses_events(items: list[dict[str, Any]]) -> list[Event]:
    usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    answer = {"id": "resp_1", "status": "completed", "output": items, "usage": usage}
    done = [
        {"type": "response.output_item.done", "output_index": n, "item": item} for n, item in enumerate(items)
    ]
    events = [{"type": "response.created", "response": {"id": "resp_1"}}, *done]
    return [(event["type"], event) for event in [*events, {"type": "response.completed", "response": answer}]]


def responses_results(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for item in body.get("input", []):
        if item.get("type") == "function_call_output":
            yield item["call_id"], item["output"]


def messages_call(body: dict[str, Any], call: str, name: dict[str, str], arguments: str) -> list[Event]:
    block = {"type": "tool_use", "id": call, "name": name["name"], "input": {}}
    return messages_events(block, {"type": "input_json_delta", "partial_json": arguments}, "tool_use")


def messages_end(_body: dict[str, Any]) -> list[Event]:
    return messages_events({"type": "text", "text": ""}, {"type": "text_delta", "text": "Done."}, "end_turn")


def messages_events(block: dict[str, Any], delta: dict[str, Any], why: str) -> list[Event]:
    usage = {"input_tokens": 1, "output_tokens": 1}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "stand-in", "content": []}
    message |= {"stop_reason": None, "stop_sequence": None, "usage": usage}
    events = [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": why, "stop_sequence": None}, "usage": usage},
        {"type": "message_stop"},
    ]
    return [(event["type"], event) for event in events]


def messages_results(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for message in body.get("messages", []):
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part.get("type") == "tool_result":
                yield part["tool_use_id"], part.get("content", "")


def chat_call(body: dict[str, Any], call: str, name: dict[str, str], arguments: str) -> list[Event]:
    function = {"name": name["name"], "arguments": arguments}
    asked = {"index": 0, "id": call, "type": "function", "function": function}
    return chat_events({"role": "assistant", "tool_calls": [asked]}, "tool_calls")


def chat_end(_body: dict[str, Any]) -> list[Event]:
    return chat_events({"role": "assistant", "content": "Done."}, "stop")


def chat_events(delta: dict[str, Any], why: str) -> list[Event]:
    frame = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "stand-in"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    first = {**frame, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    return [
        ("", first),
        ("", {**frame, "choices": [{"index": 0, "delta": {}, "finish_reason": why}], "usage": usage}),
    ]


def chat_results(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for message in body.get("messages", []):
        if message.get("role") == "tool":
            yield message["tool_call_id"], message["content"]


FORMS = {
    "/v1/responses": (responses_call, responses_end, responses_results),
    "/v1/messages": (messages_call, messages_end, messages_results),
    "/v1/chat/completions": (chat_call, chat_end, chat_results),
}


class Model(http.server.ThreadingHTTPServer):
    """The stand-in, and the proxy that refuses everything else. `outside` has what was asked of it."""

    daemon_threads = True

    def __init__(self) -> None:
        self.outside: list[str] = []
        self._asked: queue.Queue[tuple[str, str]] = queue.Queue()
        self._results: queue.Queue[Any] = queue.Queue()
        self._turn = threading.Lock()
        self._wanted: tuple[str, str] | None = None
        self._patience = 80
        self._calls, self._given, self._conversation = 0, 0, 0
        model = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                if path in FORMS:
                    return self._stream(model.answer(path, json.loads(body)))
                self._refuse()

            def _stream(self, events: list[Event]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # it was ended, and waits no more
                    for name, event in events:
                        line = f"event: {name}\n" if name else ""
                        self.wfile.write(f"{line}data: {json.dumps(event)}\n\n".encode())
                    self.wfile.write(b"data: [DONE]\n\n")
                self.close_connection = True

            def _refuse(self) -> None:
                model.outside.append(f"{self.command} {self.path}")
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD = do_CONNECT = _refuse

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self.server_address[1]
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self._thread.start()

    def answer(self, path: str, body: dict[str, Any]) -> list[Event]:
        """What the model says: the next call that the test wants.

        A request that offers no tools is about something else, such as a title.
        """
        call, end, results = FORMS[path]
        if not body.get("tools"):
            return end(body)
        conversation = self._conversation
        with self._turn:
            for number, result in results(body):
                if number == f"call_{self._calls}" and self._given < self._calls:
                    self._given = self._calls
                    self._results.put(result)
            while True:
                if self._wanted is None:
                    with contextlib.suppress(queue.Empty):
                        self._wanted = self._asked.get(timeout=0.05)
                if conversation != self._conversation:  # what is wanted is meant for the next one
                    return end(body)
                if self._wanted is not None:
                    break
            name = tool_name(body, self._wanted[0])
            if name is None and self._patience:  # the assistant still connects: its next request may list it
                self._patience -= 1
                time.sleep(1)
                return call(body, f"early_{self._patience}", {"name": self._wanted[0]}, "{}")
            arguments, self._wanted = self._wanted[1], None
            self._calls += 1
            return call(body, f"call_{self._calls}", name or {"name": "unlisted"}, arguments)

    def call(self, name: str, arguments: dict[str, object]) -> str:
        """What the assistant got from a tool that it was told to call."""
        self._asked.put((name, json.dumps(arguments)))
        try:
            result = self._results.get(timeout=ANSWER_LIMIT)
        except queue.Empty:
            raise ClientFailed(f"no result of {name} within {ANSWER_LIMIT:.0f} s") from None
        return result if isinstance(result, str) else json.dumps(result)

    def forget(self) -> None:
        """End the conversation: who still waits in it is told nothing more."""
        self._conversation += 1

    def close(self) -> None:
        """Let whoever waits go, and stop."""
        self.forget()
        self.shutdown()
        self._thread.join()
        self.server_close()


def run_on_a_terminal(
    words: list[object], environment: dict[str, str], folder: Path, done: Callable[[], bool] | None = None
) -> None:
    """Run a program that wants a terminal, to its end, or until `done` is true.

    ClientFailed with what it printed if that takes too long.
    """
    ours, theirs = pty.openpty()
    argv = [str(word) for word in words]
    process = subprocess.Popen(
        argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=folder, start_new_session=True
    )
    os.close(theirs)
    said, finished = b"", False
    deadline = time.monotonic() + LOGIN_LIMIT
    while not finished and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # the terminal's other end is gone
                said += os.read(ours, 65536)
        finished = process.poll() is not None if done is None else done()
    status = process.poll()
    end_group(process)
    os.close(ours)
    if not finished or (done is None and status != 0):
        raise ClientFailed(f"status {status}: {argv}: {said.decode(errors='replace')[-3000:]}")


class Assistant:
    """An assistant in one conversation, whose model is the test."""

    def __init__(self, programs: Path, url: str, folder: Path) -> None:
        self._folder, self._url, self._programs = folder, url, programs
        self._model = Model()
        self._program: Program | None = None
        self._environment = person_environment(folder)
        self._environment |= {"HTTPS_PROXY": self._model.url, "HTTP_PROXY": self._model.url}
        self._environment |= {"NO_PROXY": "127.0.0.1,localhost", "TERM": "xterm-256color"}
        try:
            self._prepare()
            self._program = self._start()
        except BaseException:
            self.__exit__()
            raise

    def _start(self) -> Program:
        """Begin the conversation; it reads nothing, and would wait for the end of it."""
        program = Program(self._talk(), environment=self._environment, folder=self._folder, patience=0)
        assert program.process.stdin is not None
        program.process.stdin.close()
        return program

    def _prepare(self) -> None:
        """Tell it of its model and of the broker, and log in."""
        raise NotImplementedError

    def _talk(self) -> list[object]:
        """The command of a conversation."""
        raise NotImplementedError

    def _run(self, *words: object) -> None:
        done = run_program(words, environment=self._environment, folder=self._folder)
        if done.returncode:
            raise ClientFailed(done.stdout + done.stderr)

    @property
    def logins(self) -> int:
        return visits(self._folder)

    def call(self, name: str, arguments: dict[str, object] | None = None) -> dict[str, Any]:
        try:
            return {"text": self._model.call(name, arguments or {})}
        except ClientFailed as error:
            raise ClientFailed(f"{error}: {self._program and self._program.errors()}") from None

    def start_anew(self) -> None:
        """End the conversation and begin another."""
        self._stop()
        self._program = self._start()

    def _stop(self) -> None:
        assert self._program is not None
        self._program.__exit__()
        self._model.forget()

    def expire(self) -> None:
        """It learns so from the 401."""

    def __enter__(self) -> Assistant:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._model.close()
        if self._program:
            self._program.__exit__()


class Codex(Assistant):
    """Codex: it logs in when it is told of a server."""

    def _prepare(self) -> None:
        self._words: list[object] = [
            *self._programs.glob("@openai/codex-linux-x64/vendor/*/bin/codex"),
        ]
        (self._folder / ".codex").mkdir()
        (self._folder / ".codex" / "config.toml").write_text(
            'model = "stand-in"\nmodel_provider = "here"\napproval_policy = "never"\n'
            '[model_providers.here]\nname = "here"\n'
            f'base_url = "{self._model.url}/v1"\nwire_api = "responses"\n'
            "request_max_retries = 0\nstream_max_retries = 0\nstream_idle_timeout_ms = 600000\n"
        )
        self._run(*self._words, "mcp", "add", "forgejo", "--url", self._url)

    def _talk(self) -> list[object]:
        flags = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
        return [*self._words, "exec", *flags, "Call the tools."]


class ClaudeCode(Assistant):
    """Claude Code: its login wants a terminal."""

    def _prepare(self) -> None:
        self._words: list[object] = [self._programs / "@anthropic-ai/claude-code-linux-x64/claude"]
        self._environment |= {"ANTHROPIC_BASE_URL": self._model.url, "ANTHROPIC_API_KEY": "none"}
        self._environment |= {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"}
        self._environment["ENABLE_TOOL_SEARCH"] = "false"
        self._run(*self._words, "mcp", "add", "--transport", "http", "--scope", "user", "forgejo", self._url)
        run_on_a_terminal([*self._words, "mcp", "login", "forgejo"], self._environment, self._folder)

    def _talk(self) -> list[object]:
        flags = ["--model", "stand-in", "--allowedTools", "mcp__forgejo"]
        return [*self._words, "-p", "Call the tools.", *flags]


class CopilotCli(Assistant):
    """GitHub Copilot's command line.

    It logs in by itself, on a terminal only, and refreshes when it starts.
    """

    def _prepare(self) -> None:
        self._words: list[object] = [self._programs / "@github/copilot-linux-x64/copilot"]
        self._environment |= {"COPILOT_OFFLINE": "true", "COPILOT_PROVIDER_BASE_URL": self._model.url + "/v1"}
        self._environment |= {"COPILOT_MODEL": "stand-in", "COPILOT_PROVIDER_API_KEY": "none"}
        self._environment |= {"COPILOT_AUTO_UPDATE": "false", "COPILOT_ALLOW_ALL": "true"}
        self._run(*self._words, "mcp", "add", "--transport", "http", "forgejo", self._url)
        words = [*self._words, "-i", "Wait."]
        run_on_a_terminal(words, self._environment, self._folder, done=self._has_tokens)
        self._model.forget()

    def call(self, name: str, arguments: dict[str, object] | None = None) -> dict[str, Any]:
        """As the others, but it remembers the tools of before.

        What is called while it still connects "requires authentication".
        """
        deadline = time.monotonic() + CONNECT_LIMIT
        answer = super().call(name, arguments)
        while "requires authentication" in answer["text"] and time.monotonic() < deadline:
            time.sleep(0.5)
            answer = super().call(name, arguments)
        return answer

    def _has_tokens(self) -> bool:
        kept = self._folder.glob(".copilot/mcp-oauth-config/*.tokens.json")
        return any("oken" in path.read_text(errors="replace") for path in kept)

    def _talk(self) -> list[object]:
        return [*self._words, "-p", "Call the tools.", "--allow-all-tools"]

    def expire(self) -> None:
        """Date its stored token back and start it anew.

        It refreshes by its own clock, and while it runs it keeps the token that it has.
        """
        self._stop()
        for path in self._folder.glob(".copilot/mcp-oauth-config/*.tokens.json"):
            aged = re.sub(r'("expires_?at"\s*:\s*)\d+', r"\g<1>1", path.read_text(), flags=re.IGNORECASE)
            path.write_text(aged)
        self._program = self._start()
