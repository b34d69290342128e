"""How far two results of the same arithmetic may be apart where their sums are added in other orders, in float32."""

UNIT = 2.0**-24  # a float32 is rounded by at most this part of itself


def apart(num_terms: int, num_products: int) -> float:
    """The largest relative distance of two results of ``num_products`` matrix products in a row, of sums of ``num_terms``.

    A sum of n terms, added in any order, is off by at most n units of the sum of the absolute values (Higham, Accuracy and
    Stability of Numerical Algorithms, section 4.2), products in a row add up what they are off by, and both results are off.
    Meant for the norm of a whole result: a single number may be a small rest of large terms.
    """
    return 2 * num_terms * num_products * UNIT


def apart_tiny_llama(num_tokens: int = 128) -> float:
    """``apart`` of a gradient of ``make_llama()``: the longest sums are over its vocabulary, or over a batch's tokens.

    Products in a row: queries, scores, values, output, up and down in each of four layers, and the head; as many on the way
    back, and one for the gradient of a weight.
    """
    return apart(max(130, num_tokens), 2 * (4 * 6 + 1) + 1)
