"""The report of `make align`: its differences by hand, and the plain text it measures on."""

import numpy as np
import pytest

from tools.align import MEASURES, change, prose, report
from tools.tables import align_table, in_chinese


def test_a_change_is_paired_over_the_prompts_where_both_are_known():
    """Differences .2 and .4 (the third prompt has no constraint): mean .3, standard error .1, t(1
    degree, .975) = 12.706.
    """
    before, after = np.array([0.1, 0.2, np.nan]), np.array([0.3, 0.6, np.nan])
    old, new, gain, low, high = change(before, after)
    assert (old, new, gain) == pytest.approx((0.15, 0.45, 0.3))
    assert (low, high) == pytest.approx((0.3 - 1.2706, 0.3 + 1.2706), abs=1e-3)


def test_the_report_shows_every_measure_and_the_price_in_plain_language():
    before = {name: np.array([0.2, 0.4]) for name in MEASURES}
    after = {name: np.array([0.3, 0.6]) for name in MEASURES}
    text = report(before, after, 20.0, 21.0)
    assert all(title in text for title, _ in MEASURES.values())
    assert "| 20.00 | 21.00 | × 1.050 |" in text
    assert "| constraints met | 0.300 | 0.450 | 0.150 [" in text


def test_the_plain_text_is_english_prose_and_enough_of_it():
    """5,000 tokens are about 3,800 words."""
    found = prose()
    assert sum(len(text.split()) for text in found) > 3800
    assert not [text for text in found if text.startswith(("|", "#", "<"))]
    assert not [text for text in found if "](" in text or "的" in text]


def test_the_pages_table_says_what_it_took_or_that_nothing_was_measured():
    """90 s of 2.5 minutes; 4.8e9 bytes."""
    machine = {"gpu": [], "cpu": "made up", "cores": 2, "memory_bytes": 8e9, "versions": {}}
    took = {"machine": machine, "precision": "bfloat16", "minutes": 2.5, "training_minutes": 1.5}
    took |= {"peak_memory_bytes": 4.8e9, "seed": 0, "pairs": 512, "steps": 32, "prompts": 128}
    text = align_table(took | {"samples": 4, "table": "| a |"})
    assert "Pairs: 512, steps: 32, seed 0." in text and text.endswith("\n\n| a |\n")
    assert "Minutes: 2.5, of training 1.5 (bfloat16). Peak memory: 4.8 GB." in text
    assert "資料對：512，步數：32，種子 0。" in in_chinese(text)
    assert "not measured" in align_table(None)
