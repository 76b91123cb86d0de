"""Captions of an icon: the words a person would type to get it."""

from __future__ import annotations

_SILENT_H_OR_YOU = ("euro", "unicorn", "ufo", "uniform", "ukulele")
_NO_ARTICLE = ("glasses", "jeans", "scissors", "headphones", "french fries", "star-struck", "grapes", "cherries",
               "blueberries", "pancakes", "popcorn", "sushi", "spaghetti", "broccoli", "bread", "rain", "fire", "cheese",
               "honey", "chocolate", "coffee", "wine", "beer", "yarn", "candy", "corn", "tennis", "pizza")  # fmt: skip

COLOUR_WORDS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "grey", "white")


def article(phrase: str) -> str:
    """`phrase` with its indefinite article ("an apple", "a euro"), or as it is where English has none."""
    if phrase.lower() in _NO_ARTICLE:
        return phrase
    vowel = phrase[0].lower() in "aeiou" and not phrase.lower().startswith(_SILENT_H_OR_YOU)
    return f"{'an' if vowel else 'a'} {phrase}"


def bare_name(label: str) -> str:
    """The label without a colour word in front: "red apple" -> "apple", so that "a blue apple" can be said."""
    first, _, rest = label.partition(" ")
    return rest if first in COLOUR_WORDS and rest else label


def names(label: str, synonyms: tuple[str, ...], colour: str | None) -> list[str]:
    """What the thing is called; without the label's own colour word where another colour is asked for."""
    if colour is None:
        return [label, *synonyms]
    spoken = [bare_name(name) for name in (label, *synonyms)]
    return list(dict.fromkeys(spoken))


def captions(
    label: str, synonyms: tuple[str, ...], style: str, colour: str | None, *, recoloured: bool, is_default: bool
) -> list[str]:
    """All captions of one image, most specific last.

    Args:
        label: the concept, as emojibase names it.
        synonyms: other names of the concept.
        style: the pack's name in prompts, for "..., noto style".
        colour: the dominant colour, or None where no colour dominates.
        recoloured: the image is a hue-shifted copy: every caption must then name the colour.
        is_default: the style is what a prompt without a style means; the captions of all others name their style.
    """
    plain: list[str] = []
    if not recoloured:
        for name in names(label, synonyms, None):
            plain += [name, article(name)]
    if colour is not None:
        for name in names(label, synonyms, colour):
            plain += [f"{colour} {name}", _with_colour(colour, name)]
    plain = list(dict.fromkeys(plain))
    styled = [f"{caption}, {style} style" for caption in plain]
    return plain + styled if is_default else styled


def _with_colour(colour: str, name: str) -> str:
    if name.lower() in _NO_ARTICLE:
        return f"{colour} {name}"
    return article(f"{colour} {name}")
