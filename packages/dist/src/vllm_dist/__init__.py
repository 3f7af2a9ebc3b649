"""A backend in another process or on another machine, behind the same protocol.

The frames are those of `vllm_traits.wire`. A connection begins with a handshake in which both
sides prove that they know a secret; what follows is neither encrypted nor signed, so that a
connection between machines belongs on a private network. Knows no engine and no model.
"""

from vllm_dist.channel import Channel, ChannelClosed
from vllm_dist.handshake import Role, accept_channel, connect_channel, handshake
from vllm_dist.launch import launch_backend
from vllm_dist.remote import RemoteBackend
from vllm_dist.serve import Inbox, serve_backend

__all__ = [
    "Channel",
    "ChannelClosed",
    "Inbox",
    "RemoteBackend",
    "Role",
    "accept_channel",
    "connect_channel",
    "handshake",
    "launch_backend",
    "serve_backend",
]
