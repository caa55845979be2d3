"""A small RESP server, with the faults that a real one has once in a while."""

from __future__ import annotations

import contextlib
import fnmatch
import socket
import socketserver
import threading
import time


class RespServer:
    """GET, SET NX EX, TOUCH, EXPIRE, UNLINK, SCAN, PING and what a client says first, over a dict of bytes.

    Faults are switched on by the attributes below; ``stop()`` and ``start()`` are a restart on the same port.
    """

    def __init__(self, password=None):
        self.values, self.until, self.password = {}, {}, password
        self.most_values = None
        self.heal()
        self.before = lambda name: None
        self.lock = threading.Lock()
        self.port, self._server = 0, None
        self.start()

    def heal(self):
        """Do as it should."""
        self.stalls_at = None  # a command that is never answered
        self.trickles = False  # one byte at a time
        self.hangs_up_at = None  # a command at which the connection is closed, half a reply sent
        self.refusals = {}  # by command: an error
        self.answers = {}  # by command: raw bytes instead of a reply

    @property
    def url(self):
        return f"valkey://{':' + self.password + '@' if self.password else ''}127.0.0.1:{self.port}/0"

    def start(self):
        self._stopped = threading.Event()
        self._sockets = set()
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.ours, self.port = self, self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self, forget=False):
        if self._server is None:
            return
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        for each in list(self._sockets):
            _hang_up(each)
        self._server = None
        if forget:
            self.values.clear()

    def answer(self, words):
        """Return the reply to a command, as bytes."""
        name, rest = words[0].decode().upper(), words[1:]
        self.before(name)
        with self.lock:
            now = time.monotonic()
            for key in [key for key, end in self.until.items() if end <= now]:
                self.values.pop(key, None), self.until.pop(key)
            if name in self.answers:
                return self.answers[name]
            if name in self.refusals:
                return b"-%s\r\n" % self.refusals[name].encode()
            return getattr(self, f"_{name.lower()}", self._unknown)(*rest)

    def _unknown(self, *rest):
        return b"-ERR unknown command\r\n"

    def _ping(self, *rest):
        return b"+PONG\r\n"

    def _auth(self, *rest):
        return b"+OK\r\n" if rest[-1].decode() == self.password else b"-WRONGPASS invalid username-password pair\r\n"

    def _select(self, number):
        return b"+OK\r\n"

    def _get(self, key):
        value = self.values.get(key)
        return b"$-1\r\n" if value is None else b"$%d\r\n%s\r\n" % (len(value), value)

    def _set(self, key, value, *options):
        if b"NX" in options and key in self.values:
            return b"$-1\r\n"
        if self.most_values is not None and len(self.values) >= self.most_values:
            return b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
        self.values[key] = value
        if b"EX" in options:
            self.until[key] = time.monotonic() + int(options[options.index(b"EX") + 1])
        return b"+OK\r\n"

    def _touch(self, *keys):
        return b":%d\r\n" % sum(key in self.values for key in keys)

    def _expire(self, key, seconds):
        if key in self.values:
            self.until[key] = time.monotonic() + int(seconds)
        return b":%d\r\n" % (key in self.values)

    def _unlink(self, *keys):
        return b":%d\r\n" % sum(self.values.pop(key, None) is not None for key in keys)

    def _scan(self, cursor, _, pattern, *rest):
        """Two pages, as long as there are keys for them."""
        keys = sorted(self.values)
        page, after = (keys[: len(keys) // 2], b"1") if cursor == b"0" and len(keys) > 1 else (keys, b"0")
        found = [key for key in page if fnmatch.fnmatchcase(key.decode(), pattern.decode())]
        listed = b"".join(b"$%d\r\n%s\r\n" % (len(key), key) for key in found)
        return b"*2\r\n$1\r\n%s\r\n*%d\r\n%s" % (after, len(found), listed)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    block_on_close = False


class _Handler(socketserver.StreamRequestHandler):
    def handle(self):
        ours = self.server.ours
        stopped = ours._stopped
        ours._sockets.add(self.connection)
        try:
            while line := self.rfile.readline():
                words = [self._word() for _ in range(int(line[1:]))]
                name = words[0].decode().upper()
                reply = ours.answer(words)
                if name == ours.stalls_at:
                    while name == ours.stalls_at and not stopped.wait(0.01):
                        pass
                if name == ours.hangs_up_at:
                    self.wfile.write(reply[: len(reply) // 2])
                    return
                while ours.trickles and reply and not stopped.wait(0.04):
                    self.wfile.write(reply[:1])
                    reply = reply[1:]
                self.wfile.write(reply)
        except (OSError, ValueError):
            pass
        finally:
            ours._sockets.discard(self.connection)
            _hang_up(self.connection)

    def _word(self):
        size = int(self.rfile.readline()[1:])
        return self.rfile.read(size + 2)[:-2]


def _hang_up(connection):
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
