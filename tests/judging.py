"""A pair judged by one method alone."""

from bulkedge.comparison import judge_pair


def certified(pair, recipe):
    """Intervals from products; None where they are not to be had that way."""
    found = judge_pair(pair, recipe.model_copy(update={"method": "certified"}))
    return found if found.method == "certified" else None


def dense(pair, recipe):
    """By two SVDs."""
    return judge_pair(pair, recipe.model_copy(update={"method": "dense"}))
