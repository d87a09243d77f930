"""Delivery of events to an MQTT broker: `hkd-demo --mqtt mqtt://user:password@host:1883/topic`.

Topics follow Frigate: TOPIC/available, TOPIC/CAMERA/frame, TOPIC/CAMERA/status. Messages have QoS 1. `frame` and
`status` are retained, so that a new subscriber has the current state at once.
"""

import json
import re
from collections.abc import Sequence
from time import monotonic
from typing import Any
from urllib.parse import unquote

from hkd_deploy.demo.cameras import make_slugs
from hkd_deploy.demo.delivery import (
    DEFAULT_EVERY_S,
    FLUSH_S,
    MAX_BUFFERED,
    EventPublisher,
    Report,
    describe_network_error,
    parse_address,
)
from hkd_deploy.streams import redact_url
from hkd_det import __version__
from hkd_det.errors import UsageError, import_package

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
DEFAULT_TOPIC = "hkd"
DISCOVERY_PREFIX = "homeassistant"
INSTALL_HINT = "--mqtt requires it. Run pip install 'hkd-det[mqtt]'."
QOS = 1  # at least once
RETAINED_EVENTS = ("frame", "status")  # states; a retained crossing would repeat at each restart of a subscriber
MAX_IN_FLIGHT = 20  # events sent and not confirmed; the client sends them again after a reconnect
CONNECT_TIMEOUT_S = 5.0
KEEPALIVE_S = 15
LOOP_S = 0.05  # longest time until a new event is sent
REFUSALS = {
    "Bad user name or password": "the broker refuses user and password. Check them (mqtt://user:password@host/topic).",
    "Not authorized": "the broker refuses user and password. Check them (mqtt://user:password@host/topic).",
    "Server unavailable": "the broker is not available. Events are kept.",
}


class MqttPublisher(EventPublisher):
    """Publishes events to an MQTT broker.

    Args:
        address: mqtt:// or mqtts:// URL with optional user, password and topic. The default topic is `hkd`.
        cameras: Names of the cameras.
        report: Called with one line for each change of the connection.
        every_s: Longest time between two frames of a camera that are sent, seconds. 0 sends every frame.
        has_discovery: True to announce the cameras to Home Assistant.
        max_buffered: Capacity of the buffer, events.

    Raises:
        UsageError: The URL is invalid.
        UnavailableError: paho-mqtt is not installed.
    """

    def __init__(
        self,
        address: str,
        cameras: Sequence[str],
        report: Report,
        every_s: float = DEFAULT_EVERY_S,
        has_discovery: bool = False,
        max_buffered: int = MAX_BUFFERED,
    ) -> None:
        parts = parse_address("--mqtt", address, DEFAULT_PORTS)
        super().__init__(f"{parts.scheme}://{parts.hostname}:{parts.port}", report, every_s, max_buffered)
        self._topic = unquote(parts.path).strip("/") or DEFAULT_TOPIC
        if re.search(r"[+#\0]", self._topic) or parts.query or parts.fragment:
            message = f"--mqtt {redact_url(address)}: a topic has no +, #, ? or control characters. Choose another one."
            raise UsageError(message)
        self._host, self._port = str(parts.hostname), int(parts.port or 0)
        self._slugs = make_slugs(cameras)
        self._has_discovery = has_discovery
        self._refusal: str | None = None  # answer of the broker to CONNECT; empty if it accepts
        self._sent: set[int] = set()  # message ids
        paho = import_package("paho.mqtt.client", "paho-mqtt", INSTALL_HINT)
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)
        self._client.connect_timeout = CONNECT_TIMEOUT_S
        self._client.on_connect, self._client.on_publish = self._on_connect, self._on_publish
        self._client.will_set(f"{self._topic}/available", "offline", QOS, retain=True)
        if parts.username is not None:
            self._client.username_pw_set(unquote(parts.username), unquote(parts.password or ""))
        if parts.scheme == "mqtts":
            self._client.tls_set()
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            problem = self._connect()
            self._set_problem(problem)
            if not problem:
                self._announce("online")
                if self._exchange():
                    self._flush()
                    return
                self._set_problem("the connection was closed. Events are kept.")
            self._wait_before_retry()

    def _connect(self) -> str:
        """Connect, and wait for the answer of the broker. Return the problem, or an empty text."""
        self._refusal = None
        try:
            self._client.connect(self._host, self._port, KEEPALIVE_S)
        except (OSError, UnicodeError) as error:
            return describe_network_error(error)
        end_s = monotonic() + CONNECT_TIMEOUT_S
        while self._refusal is None and not self._stop.is_set():
            if monotonic() > end_s:
                return describe_network_error(TimeoutError())
            if self._client.loop(LOOP_S) and self._refusal is None:
                return describe_network_error(ConnectionError())
        return self._refusal or ""

    def _exchange(self) -> bool:
        """Send events until the connection is lost (False) or the publisher is closed (True)."""
        while not self._stop.is_set():
            self._send()
            if self._client.loop(LOOP_S):
                return False
        return True

    def _send(self) -> None:
        for event in self._buffer.take(MAX_IN_FLIGHT - len(self._sent)):
            kind, slug = event["event"], self._get_slug(event["camera"])
            topic, is_retained = f"{self._topic}/{slug}/{kind}", kind in RETAINED_EVENTS
            self._sent.add(self._client.publish(topic, json.dumps(event), QOS, is_retained).mid)

    def _flush(self) -> None:
        """Send what is in the buffer, at most for a second, and disconnect."""
        end_s = monotonic() + FLUSH_S
        is_connected = True
        while is_connected and self.num_waiting and monotonic() < end_s:
            self._send()
            is_connected = not self._client.loop(LOOP_S)
        if is_connected:
            self._announce("offline")
            self._client.loop(LOOP_S)
            self._client.disconnect()

    def _announce(self, availability: str) -> None:
        """Publish the availability and, for Home Assistant, the cameras."""
        self._client.publish(f"{self._topic}/available", availability, QOS, retain=True)
        if self._has_discovery and availability == "online":
            for camera in self._slugs:
                self._announce_camera(camera)

    def _announce_camera(self, camera: str) -> None:
        topic, payload = make_discovery(self._topic, camera, self._slugs[camera])
        self._client.publish(topic, json.dumps(payload), QOS, retain=True)

    def _get_slug(self, camera: str) -> str:
        if camera not in self._slugs:
            self._slugs = make_slugs([*self._slugs, camera])
            if self._has_discovery:
                self._announce_camera(camera)
        return self._slugs[camera]

    def _on_connect(self, _client: Any, _userdata: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        text = str(reason)
        default = f"the broker refuses the connection ({text}). Its log states why."
        self._refusal = REFUSALS.get(text, default) if reason.is_failure else ""

    def _on_publish(self, _client: Any, _userdata: Any, message_id: int, *_: Any) -> None:
        if message_id in self._sent:
            self._sent.remove(message_id)
            self.num_delivered += 1


def make_discovery(topic: str, camera: str, slug: str) -> tuple[str, dict[str, Any]]:
    """Describe a camera for Home Assistant (device discovery, version 2024.12 or later).

    Args:
        topic: First levels of all topics.
        camera: Name of the camera.
        slug: Its level of the topics.

    Returns:
        Topic and content of the message.
    """
    device_id = f"hkd_{re.sub(r'[^A-Za-z0-9-]+', '_', topic)}_{slug}"
    frame, status = f"{topic}/{slug}/frame", f"{topic}/{slug}/status"
    components: dict[str, dict[str, Any]] = {
        "persons": {
            "platform": "sensor",
            "name": "Persons",
            "icon": "mdi:account-group",
            "state_topic": frame,
            "state_class": "measurement",
            "value_template": "{{ value_json.num_persons }}",
        },
        "occupancy": {
            "platform": "binary_sensor",
            "name": "Occupancy",
            "device_class": "occupancy",
            "state_topic": frame,
            "value_template": "{{ 'ON' if value_json.num_persons else 'OFF' }}",
        },
        "connection": {
            "platform": "binary_sensor",
            "name": "Connection",
            "device_class": "connectivity",
            "entity_category": "diagnostic",
            "state_topic": status,
            "value_template": "{{ 'OFF' if value_json.status.startswith(('camera lost', 'ended')) else 'ON' }}",
        },
    }
    for name, component in components.items():
        component["unique_id"] = f"{device_id}_{name}"
    payload = {
        "device": {"identifiers": [device_id], "name": camera, "manufacturer": "hkd-det", "sw_version": __version__},
        "origin": {"name": "hkd-det", "sw_version": __version__},
        "availability_topic": f"{topic}/available",
        "qos": QOS,
        "components": components,
    }
    return f"{DISCOVERY_PREFIX}/device/{device_id}/config", payload
