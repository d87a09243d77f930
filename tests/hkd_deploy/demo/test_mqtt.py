"""Tests of `--mqtt` with brokers that are stopped, killed and restarted."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from hkd_deploy.demo.cameras import make_slugs
from hkd_deploy.demo.mqtt import MqttPublisher
from hkd_det.errors import UsageError

paho = pytest.importorskip("paho.mqtt.client")
AMQTT = [sys.executable, "-c", "from amqtt.scripts.broker_script import main; main()", "-c"]
USER, PASSWORD = "camera", "pa/ss"


def make_frame(index: int, num_persons: int = 1, camera: str = "door") -> dict[str, Any]:
    return {"version": 1, "event": "frame", "camera": camera, "frame": index, "num_persons": num_persons}


def wait_for(condition: Callable[[], Any], timeout_s: float = 15.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not become true"
        time.sleep(0.02)


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Broker:
    """An MQTT broker in a process: amqtt, or mosquitto where it is installed."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.port = find_free_port()
        passwords, config = directory / "passwords", directory / "broker.conf"
        if kind == "mosquitto":
            if not shutil.which("mosquitto"):
                pytest.skip("mosquitto is not installed")
            subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, USER, PASSWORD], check=True, capture_output=True)
            config.write_text(
                f"listener {self.port} 127.0.0.1\nallow_anonymous false\npassword_file {passwords}\nuser root\n"
                "max_queued_messages 0\n"
            )
            self._command = ["mosquitto", "-c", str(config)]
        else:
            password_hash = pytest.importorskip("pwdlib").PasswordHash.recommended().hash(PASSWORD)
            passwords.write_text(f"{USER}:{password_hash}\n")
            plugin = {"amqtt.plugins.authentication.FileAuthPlugin": {"password_file": str(passwords)}}
            listeners = {"default": {"type": "tcp", "bind": f"127.0.0.1:{self.port}"}}
            config.write_text(json.dumps({"listeners": listeners, "plugins": plugin}))  # JSON is YAML
            self._command = [*AMQTT, str(config)]
        self._log_path = directory / "broker.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        wait_for(self._is_listening)

    def send_signal(self, number: int) -> None:
        assert self._process
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def _is_listening(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


class Subscriber:
    """Records all messages of a broker."""

    def __init__(self, port: int) -> None:
        self.messages: list[tuple[str, str, bool]] = []
        self._is_subscribed = Event()
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        self._client.username_pw_set(USER, PASSWORD)
        self._client.on_connect = lambda client, *_: client.subscribe("#", qos=1)
        self._client.on_subscribe = lambda *_: self._is_subscribed.set()
        self._client.on_message = lambda _client, _data, message: self.messages.append(
            (message.topic, message.payload.decode(), message.retain)
        )
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._is_subscribed.wait(10)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def list_frames(self) -> list[int]:
        return [json.loads(payload)["frame"] for topic, payload, _ in self.messages if topic.endswith("/frame")]


class GatedPublisher(MqttPublisher):
    """A publisher that connects when the test allows it, so that a subscriber is there first."""

    gate = Event()

    def _connect(self) -> str:
        self.gate.wait()
        return super()._connect()


BROKERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("amqtt", "mosquitto")]


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(request.param, tmp_path)
    yield broker
    broker.send_signal(signal.SIGCONT)
    broker.kill()


def make_address(port: int, password: str = "pa%2Fss", topic: str = "/site/hkd") -> str:
    return f"mqtt://{USER}:{password}@127.0.0.1:{port}{topic}"


def test_broker_restart_loses_nothing(broker: Broker) -> None:
    broker.start()
    subscriber, reports = Subscriber(broker.port), list[str]()
    GatedPublisher.gate.set()
    publisher = GatedPublisher(
        make_address(broker.port), ["door"], lambda text, *_, **__: reports.append(text), every_s=0
    )
    for index in range(50):
        publisher.publish(make_frame(index))
    wait_for(lambda: len(subscriber.list_frames()) == 50)
    GatedPublisher.gate.clear()

    broker.send_signal(signal.SIGSTOP)  # it takes messages and confirms none, and is killed with them
    for index in range(50, 100):
        publisher.publish(make_frame(index))
    time.sleep(0.3)
    assert publisher.num_waiting == 50
    broker.kill()
    for index in range(100, 200):
        publisher.publish(make_frame(index))
    subscriber.close()
    broker.start()
    after = Subscriber(broker.port)
    GatedPublisher.gate.set()
    wait_for(lambda: publisher.num_waiting == 0 and len(after.list_frames()) >= 150)
    publisher.close()
    frames = list(dict.fromkeys(subscriber.list_frames() + after.list_frames()))  # a repeated one is allowed
    assert frames == list(range(200))
    assert publisher.num_dropped == 0
    assert publisher.num_delivered == 200
    name = f"mqtt://127.0.0.1:{broker.port}"
    assert reports[0] == f"{name}: connected."
    assert reports[1] == f"{name}: the connection was closed. Events are kept."
    assert reports[-1] == f"{name}: connected."
    after.close()


@pytest.mark.parametrize("broker", BROKERS[:1], indirect=True)
def test_full_buffer_drops_oldest_and_reports(broker: Broker) -> None:
    GatedPublisher.gate.clear()
    reports: list[str] = []
    publisher = GatedPublisher(
        make_address(broker.port), ["door"], lambda text, *_, **__: reports.append(text), every_s=0, max_buffered=30
    )
    for index in range(100):
        publisher.publish(make_frame(index))
    assert (publisher.num_waiting, publisher.num_dropped) == (30, 70)
    broker.start()
    subscriber = Subscriber(broker.port)
    GatedPublisher.gate.set()
    wait_for(lambda: publisher.num_waiting == 0 and len(subscriber.list_frames()) >= 30)
    publisher.close()
    assert subscriber.list_frames() == list(range(70, 100))
    assert reports == [
        f"mqtt://127.0.0.1:{broker.port}: connected. 70 dropped.",
        f"mqtt://127.0.0.1:{broker.port}: events: 30 delivered, 0 not delivered, 70 dropped.",
    ]
    subscriber.close()


def test_availability_retained_state_and_last_will(broker: Broker) -> None:
    broker.start()
    code = (
        "import sys, time; from hkd_deploy.demo.mqtt import MqttPublisher\n"
        "publisher = MqttPublisher(sys.argv[1], ['front door'], lambda text, **_: print(text))\n"
        "publisher.publish({'event': 'frame', 'camera': 'front door', 'frame': 0, 'num_persons': 2})\n"
        "publisher.publish({'event': 'crossing', 'camera': 'front door'})\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, make_address(broker.port)], stdout=subprocess.PIPE)
    first = Subscriber(broker.port)
    wait_for(lambda: any(topic == "site/hkd/front_door/crossing" for topic, *_ in first.messages), 30)
    late = Subscriber(broker.port)  # receives retained messages only
    wait_for(lambda: len(late.messages) >= 2)
    time.sleep(0.3)
    assert {(topic, is_retained) for topic, _, is_retained in late.messages} == {
        ("site/hkd/available", True),
        ("site/hkd/front_door/frame", True),
    }
    assert ("site/hkd/available", "online") in [message[:2] for message in late.messages]
    process.kill()
    wait_for(lambda: ("site/hkd/available", "offline") in [message[:2] for message in first.messages], 40)
    process.communicate()
    first.close()
    late.close()


@pytest.mark.parametrize("broker", BROKERS[:1], indirect=True)
def test_close_announces_offline(broker: Broker) -> None:
    broker.start()
    subscriber = Subscriber(broker.port)
    publisher = MqttPublisher(make_address(broker.port), ["door"], lambda *_, **__: None)
    wait_for(lambda: ("site/hkd/available", "online") in [message[:2] for message in subscriber.messages])
    publisher.publish(make_frame(7))
    publisher.close()
    wait_for(lambda: ("site/hkd/available", "offline") in [message[:2] for message in subscriber.messages])
    assert subscriber.list_frames() == [7]
    subscriber.close()


def test_wrong_password_is_one_line_without_it(broker: Broker) -> None:
    broker.start()
    reports: list[str] = []
    publisher = MqttPublisher(
        make_address(broker.port, password="wr0ng"), ["door"], lambda text, *_, **__: reports.append(text), every_s=0
    )
    wait_for(lambda: reports)
    publisher.publish(make_frame(0))
    time.sleep(2.5)  # two more attempts
    publisher.close()
    assert len(reports) == 2
    assert "the broker refuses user and password." in reports[0]
    assert reports[1].endswith("events: 0 delivered, 1 not delivered, 0 dropped.")
    assert "wr0ng" not in "".join(reports)


@pytest.mark.parametrize(
    ("host", "text"), [("127.0.0.1", "nothing listens at this port"), ("no-such-host.invalid", "unknown host")]
)
def test_unreachable_broker_never_blocks(host: str, text: str) -> None:
    reports: list[str] = []
    address = f"mqtt://{USER}:s3cret@{host}:{find_free_port()}/hkd"
    publisher = MqttPublisher(address, ["door"], lambda text, *_, **__: reports.append(text), every_s=0)
    slowest_s = 0.0
    for index in range(5000):
        start_s = time.perf_counter()
        publisher.publish(make_frame(index))
        slowest_s = max(slowest_s, time.perf_counter() - start_s)
    wait_for(lambda: reports)
    start_s = time.monotonic()
    publisher.close()
    assert time.monotonic() - start_s < 2
    assert slowest_s < 0.1
    assert text in reports[0]
    assert "s3cret" not in "".join(reports)


@pytest.mark.parametrize("broker", BROKERS[1:], indirect=True)
def test_discovery_describes_topics_that_exist(broker: Broker) -> None:
    broker.start()
    subscriber = Subscriber(broker.port)
    publisher = MqttPublisher(make_address(broker.port), ["Tür 1"], lambda *_, **__: None, has_discovery=True)
    publisher.publish(make_frame(0, camera="Tür 1"))
    publisher.publish({"event": "status", "camera": "Tür 1", "status": "ok"})
    wait_for(lambda: len(subscriber.messages) == 4)
    publisher.close()
    payloads = {topic: payload for topic, payload, _ in subscriber.messages}
    topic = "homeassistant/device/hkd_site_hkd_T_r_1/config"
    device = json.loads(payloads[topic])
    assert device["availability_topic"] in payloads
    states = {component["state_topic"] for component in device["components"].values()}
    assert states <= payloads.keys()
    identifiers = [component["unique_id"] for component in device["components"].values()]
    assert len(set(identifiers)) == 3
    assert device["device"]["name"] == "Tür 1"
    subscriber.close()


@pytest.mark.parametrize("broker", BROKERS[1:], indirect=True)
def test_discovery_announces_a_camera_that_a_reload_adds(broker: Broker) -> None:
    broker.start()
    subscriber = Subscriber(broker.port)
    publisher = MqttPublisher(make_address(broker.port), ["door"], lambda *_, **__: None, has_discovery=True)
    for camera in ("yard", "door", "yard"):
        publisher.publish({"event": "status", "camera": camera, "status": "ok"})
    wait_for(lambda: len(subscriber.messages) == 6)  # availability, two announcements, three statuses
    publisher.close()
    topics = [topic for topic, _, _ in subscriber.messages]
    for camera in ("door", "yard"):
        assert topics.count(f"homeassistant/device/hkd_site_hkd_{camera}/config") == 1
    subscriber.close()


@pytest.mark.parametrize(
    "address",
    [
        "http://host/topic",
        "mqtt://",
        "mqtt://user:secret@host:port/topic",
        "mqtt://user:secret@host:1883/a/+/b",
        "mqtt://user:secret@host:1883/a#b",
        "mqtt://user:secret@host:99999/topic",
        "mqtt://user:secret@ho st/topic",
        "mqtt://user:sec/secret@host:1883/topic",
    ],
)
def test_invalid_address_is_usage_error(address: str) -> None:
    with pytest.raises(UsageError) as error:
        MqttPublisher(address, ["door"], print)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_slugs_are_different_and_safe() -> None:
    slugs = make_slugs(["door", "do/or", "do+or", "rtsp://***@10.0.0.2/x?***", "###", "..", "Garage-1"])
    assert list(slugs.values()) == ["door", "do_or", "do_or_2", "rtsp_10_0_0_2_x", "camera", "camera_2", "Garage-1"]
