"""The conductor as one agent sees it: every question is repeated until it is answered.

Only `agent.py` uses it. It is the one place where an agent waits for its conductor: while the conductor is silent, one
question at a time tries it, after growing pauses with jitter, and the others wait. It does not know what is asked.
"""

import random
from asyncio import Lock
from collections.abc import Callable
from typing import Final

import structlog

from cellway.config import Limits
from cellway.context import Clock, RequestContext
from cellway.errors import CellwayError, NotFound, Unavailable
from cellway.rpc.calls import CONDUCTOR, CallMethod, ReplyT, RequestT
from cellway.rpc.messaging import call

FIRST_PAUSE_SECONDS: Final = 0.2
"""Before the first repeat of a question that got no answer: a conductor that restarts is back in about a second."""


class Conductor:
    """Asks the conductor of one cell, for one agent."""

    def __init__(
        self, limits: Limits, clock: Clock, randomness: random.Random, log: structlog.typing.FilteringBoundLogger
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._randomness = randomness
        self._log = log
        self._silent_tries = 0
        self._trying = Lock()

    async def ask(
        self, ctx: RequestContext, method: CallMethod[RequestT, ReplyT], make: Callable[[], RequestT]
    ) -> ReplyT:
        """Return the conductor's answer. `make` gives the question anew for each try: epochs and sequences move on.

        Raises: NotFound when the conductor does not know the host.
        """
        while True:
            silent_tries = self._silent_tries
            try:
                if silent_tries == 0:
                    return await self._try(ctx, method, make)
                async with self._trying:
                    # Those who waited here behind a try that was answered go on side by side.
                    silent_tries = self._silent_tries
                    if silent_tries > 0:
                        await self._clock.sleep(self._pause_seconds(silent_tries))
                        return await self._try(ctx, method, make)
            except Unavailable as error:
                if self._silent_tries == 0:
                    self._log.warning("conductor_silent", method=method.name, code=error.code, error=error.message)
                # Questions that fail side by side count once.
                self._silent_tries = max(self._silent_tries, silent_tries + 1)
            except NotFound:
                raise
            except CellwayError as error:
                # It answers, but fails at this question and perhaps at no other: this one alone waits.
                self._log.error("conductor_failed", method=method.name, code=error.code, error=error.message)
                await self._clock.sleep(self._limits.heartbeat_seconds * self._randomness.uniform(0.5, 1))

    async def _try(
        self, ctx: RequestContext, method: CallMethod[RequestT, ReplyT], make: Callable[[], RequestT]
    ) -> ReplyT:
        seconds = self._limits.rpc_timeout_seconds
        try:
            answer = await call(ctx, method, make(), address=CONDUCTOR, timeout_seconds=seconds)
        except Unavailable:
            raise
        except CellwayError:
            self._heard()
            raise
        self._heard()
        return answer

    def _heard(self) -> None:
        if self._silent_tries > 0:
            self._log.info("conductor_answers", silent_tries=self._silent_tries)
        self._silent_tries = 0

    def _pause_seconds(self, silent_tries: int) -> float:
        longest = min(self._limits.heartbeat_seconds, FIRST_PAUSE_SECONDS * 2.0 ** min(silent_tries - 1, 16))
        return longest * self._randomness.uniform(0.5, 1)
