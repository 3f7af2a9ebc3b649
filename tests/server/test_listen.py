"""Sockets: free ports, addresses as they are shown, and what is in use."""

import pytest
from vllm_server.config import ServerSettings
from vllm_server.listen import addresses, open_socket
from vllm_traits import ConfigError


def test_port_0_becomes_a_free_port_that_is_shown():
    server = ServerSettings(host="127.0.0.1", port=0)
    with open_socket(server) as listener:
        port = listener.getsockname()[1]
        assert port > 0
        assert addresses(server, listener) == [f"http://127.0.0.1:{port}"]


def test_an_address_that_means_all_is_shown_as_ones_that_can_be_called():
    server = ServerSettings(host="0.0.0.0", port=0)
    with open_socket(server) as listener:
        assert addresses(server, listener)[0].startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    ("host", "message"),
    [("192.0.2.7", "does not have that address"), ("no host", "is no address of a machine")],
)
def test_an_address_that_is_not_ours_is_refused(host, message):
    with pytest.raises(ConfigError, match=message):
        open_socket(ServerSettings(host=host, port=0))


def test_a_port_in_use_is_refused_with_what_to_do():
    with open_socket(ServerSettings(host="127.0.0.1", port=0)) as listener:
        taken = ServerSettings(host="127.0.0.1", port=listener.getsockname()[1])
        with pytest.raises(ConfigError, match=r"another process does.*--port 0"):
            open_socket(taken)


def test_a_socket_file_in_use_is_refused_and_a_left_over_makes_room(tmp_path):
    server = ServerSettings(uds=str(tmp_path / "s"))
    with open_socket(server) as listener:
        assert addresses(server, listener) == [f"unix:{server.uds}"]
        with pytest.raises(ConfigError, match="it is in use"):
            open_socket(server)
    with open_socket(server):
        pass
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="it is in use"):
        open_socket(ServerSettings(uds=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "precious"
