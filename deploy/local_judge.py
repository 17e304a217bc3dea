"""A language model that judges: the service that is set, or SmolLM2 on this machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from common.io.endpoint import Endpoint, judge_endpoint
from common.io.pretrained import model_folder
from common.judges import Judge
from common.judging.agreement import agreement
from common.judging.language import LanguageJudge
from common.lab import not_measured
from common.profiles import SMOLLM
from deploy.serving.start import serving

VERDICT_TOKENS = 64  # of a verdict: a small model on a processor writes ten or twenty a second


@contextmanager
def language_judge(tokens: int = VERDICT_TOKENS) -> Iterator[Endpoint | None]:
    """The judge that is set, else SmolLM2-135M behind the course's own gateway, over HTTP.

    Args: `tokens`: of a reply, at most. Gives None where neither is there (`make model` fetches the
    model). Raises: common.io.endpoint.EndpointError where LAB_JUDGE_URL is set and LAB_JUDGE_MODEL
        is not; RuntimeError, TimeoutError where the gateway does not start.
    """
    options = {"temperature": 0.0, "max_tokens": tokens}
    if os.environ.get("LAB_JUDGE_URL"):
        yield judge_endpoint(options=options)
    elif not (model_folder(SMOLLM) / "README.md").exists():
        yield None
    else:
        folder = model_folder(SMOLLM)
        with serving("--model", f"{folder}") as gateway:
            own = {"options": options, "known_as": "SmolLM2-135M-Instruct here"}
            yield judge_endpoint(gateway.url, folder.name, **own)


def by_language_model(
    yardstick: Judge, questions: list[tuple[str, str, str]], tokens: int = VERDICT_TOKENS
) -> tuple[list[dict], list[LanguageJudge]]:
    """(rows of `agreement`, the judges) of a language model beside a yardstick, asked for a
    verdict with reasons, and for a bare choice.

    Returns: two empty lists where there is no model, and one line that says so.
    Raises: as `language_judge`.
    """
    with language_judge(tokens) as endpoint:
        if endpoint is None:
            why = "LAB_JUDGE_URL is not set, and `make model` was not run"
            not_measured("a language model as judge", why)
            return [], []
        forms = ("pairwise", "forced")
        judges = [LanguageJudge(endpoint, form, progress=False) for form in forms]
        return agreement([yardstick, *judges], questions), judges
