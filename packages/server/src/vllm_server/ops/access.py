"""Who may call a route: the one place where a scope becomes yes or no."""

from __future__ import annotations

from vllm_server.openai.errors import ApiError
from vllm_server.ops.auth import ANYBODY, Identity, KeyRing, credentials, is_foreign, is_local
from vllm_server.ops.exchange import Exchange
from vllm_server.ops.routes import Route


def authorize(route: Route, exchange: Exchange, keys: KeyRing) -> Identity:
    """The caller, if the route's scope lets it in.

    Raises:
        ApiError: 401 without a good key, 403 with one that is not enough.
    """
    scope = route.scope
    if scope == "public":
        return ANYBODY
    if scope == "admin":
        return _admin(exchange, keys)
    if not len(keys) and not route.needs_key:
        return ANYBODY
    identity = _identity(exchange, keys)
    enough = {"admin", "inference"} | ({"metrics"} if scope == "metrics" else set[str]())
    if not identity.scopes & enough:
        raise _forbidden("This API key lacks the scope for this route.")
    return identity


def _admin(exchange: Exchange, keys: KeyRing) -> Identity:
    """An admin key; or, from this machine only, any key where no admin keys exist, or nobody
    where no keys exist at all."""
    if is_foreign(exchange.headers):
        raise _forbidden("A page of another origin may not call this route.")
    is_here = is_local(exchange.peer, exchange.headers)
    if not len(keys):
        if is_here:
            return ANYBODY
        raise _forbidden("Without API keys this route answers calls from this machine only.")
    identity = _identity(exchange, keys)
    if "admin" in identity.scopes:
        return identity
    if not keys.has_admins and "inference" in identity.scopes and is_here:
        return identity
    raise _forbidden("This route needs an admin key.")


def _identity(exchange: Exchange, keys: KeyRing) -> Identity:
    found = [keys.find(secret) for secret in credentials(exchange.headers)]
    if len(found) == 1 and found[0] is not None:
        return found[0]
    if not found:
        message = "No API key was given; send it as `Authorization: Bearer <key>` or `x-api-key`."
    elif len(found) > 1:
        message = "Two different API keys were given; send one."
    else:
        message = "The API key is wrong."
    raise ApiError(401, "invalid_api_key", message, headers=[("www-authenticate", "Bearer")])


def _forbidden(message: str) -> ApiError:
    return ApiError(403, "insufficient_scope", message)
