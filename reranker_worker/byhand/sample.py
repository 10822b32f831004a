"""The texts that `check` scores: one pair that any reranking model must tell apart, and passages of ordinary length."""

from __future__ import annotations

QUERY = "how do I stop my bread from going stale"
RELEVANT = "Bread stays fresh longest at room temperature in a closed box or a paper bag; the refrigerator makes it stale sooner."
IRRELEVANT = "The committee approved the budget for the new railway bridge after three hours of debate."

_SENTENCES = (
    "The harbour was built in the nineteenth century and still handles most of the region's grain.",
    "To replace the filter, turn off the water, unscrew the housing by hand and keep the rubber ring.",
    "Her second novel sold fewer copies than the first, although critics praised it more.",
    "A database index speeds up reads at the price of slower writes and additional disk space.",
    "The recipe calls for two cups of flour, a pinch of salt and a spoonful of honey.",
    "Heavy rain delayed the train by forty minutes, and passengers were offered tea in the waiting room.",
    "Researchers compared the two treatments in a trial with four hundred patients over eighteen months.",
    "The museum opens at ten, closes at six and is free of charge on the first Sunday of each month.",
    "If the printer does not respond, check the cable, restart the spooler and install the driver again.",
    "Small birds keep warm in winter by fluffing up their feathers and sharing sheltered places at night.",
    "The contract may be ended by either side with a notice of three months to the end of a quarter.",
    "Light from the nearest star other than the Sun takes a little over four years to reach us.",
)


def passages(count: int) -> list[str]:
    """Different passages of two to five sentences, about 60 tokens on average; the same at every call."""
    size = len(_SENTENCES)
    texts = []
    for number in range(count):
        picked = [_SENTENCES[(number * 5 + step * (1 + number // size)) % size] for step in range(2 + number % 4)]
        texts.append(f"{number + 1}. " + " ".join(picked))
    return texts
