"""Servers that are asked over HTTP: which URLs are taken, and the key that goes with a request."""

from __future__ import annotations

import ipaddress
import os

import httpx2

from perdure.types import InputError

_NEAR = (".local", ".internal", ".lan", ".svc")
"""Ends of names that are resolved inside a network only."""


def key_of(variable: str) -> str:
    """The key in an environment variable; "" where there is none. Raises InputError for one that no header can hold."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{variable}: holds characters that no key has; set it anew")
    return key


def headers_for(url: str, variable: str) -> dict[str, str]:
    """Of each request to ``url``: the key in an environment variable as a bearer token, where there is one.

    Raises InputError for what is no URL of a server, for a URL with a name or password in it (settings are kept with
    every version), and for one that would carry the key across the internet in clear text."""
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise InputError(f"{url}: not a URL: {error}") from error
    if parts.userinfo:
        at = f"{parts.scheme}://{parts.host}"
        raise InputError(f"{at}: the URL holds a name or a password; leave it out and put a key into {variable}")
    if parts.scheme not in ("http", "https") or not parts.host:
        raise InputError(f"{url}: expected a URL such as http://localhost:8000")
    key = key_of(variable)
    if key and parts.scheme == "http" and not _is_near(parts.host):
        raise InputError(f"{url}: would send the key in {variable} in clear text; use https, or unset {variable}")
    return {"Authorization": f"Bearer {key}"} if key else {}


def without_key(text: str, variable: str) -> str:
    """Servers repeat a key that they refuse."""
    key = key_of(variable)
    return text.replace(key, "***") if key else text


def _is_near(host: str) -> bool:
    """Whether a host is this machine or one of a network of one's own, as far as its name tells."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(_NEAR)
    return address.is_private or address.is_loopback
