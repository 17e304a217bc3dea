"""Signs of over-optimisation in the metrics of a run, with their remedies."""

import math

KL_LIMIT, ACCURACY_LIMIT = 20.0, 0.95  # the course pages' limits (claims D6 and D7)


def signs_of_over_optimisation(metrics: list[dict]) -> list[str]:
    """What the course pages warn of, each with its remedies, from the rows since the last two
    evaluations.
    """
    signs = []
    evaluated = [index for index, row in enumerate(metrics) if "held_out_loss" in row]
    now, rows = metrics[evaluated[-1]], metrics[evaluated[-2] + 1 :] if len(evaluated) > 1 else []
    knob = "lower lambda" if "held_out_odds_ratio_loss" in now else "raise beta"  # ORPO has no beta
    remedy = f"stop earlier, {knob}, or lower the learning rate"
    if now.get("held_out_kl", 0.0) > KL_LIMIT:
        signs.append(
            f"KL to the reference is {now['held_out_kl']:.1f} nats (> {KL_LIMIT:.0f}): {remedy}."
        )
    right = [row["accuracy"] for row in rows if "accuracy" in row]
    if right and sum(right) / len(right) > ACCURACY_LIMIT:
        signs.append(
            f"Training accuracy is {sum(right) / len(right):.3f} (> {ACCURACY_LIMIT}): {remedy}."
        )
    if len(evaluated) > 2:
        before = metrics[evaluated[-2]]
        earlier = metrics[evaluated[-3] + 1 : evaluated[-2] + 1]
        falling = _mean(rows, "loss") < _mean(earlier, "loss")
        if falling and now.get("held_out_nll", 0.0) > 1.02 * before.get("held_out_nll", math.inf):
            signs.append(
                f"The loss falls but the held-out NLL rises to {now['held_out_nll']:.3f}: {remedy}."
            )
        rate, rate_before = (row.get("held_out_win_rate") for row in (now, before))
        if falling and None not in (rate, rate_before) and rate < rate_before - 0.05:
            signs.append(f"The loss falls but the win rate falls to {rate:.2f}: {remedy}.")
    return signs


def _mean(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
