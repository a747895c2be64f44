"""Implementations of the attentions, called with the arguments of the package's public functions."""

from twinmesh.kernels_pallas import reference
from twinmesh.kernels_pallas.arguments import AttentionOptions, PagedKV, as_first_page


def spelled_out(attention):
    """Turn an implementation that takes `PagedKV` and `AttentionOptions` into a function of single arguments."""

    def call(q, k_pages, v_pages, page_table, kv_len, q_start=None, first_page=0, **options):
        starts = () if q_start is None else (q_start,)
        kv = PagedKV(k_pages, v_pages, page_table, kv_len, as_first_page(first_page))
        return attention(q, kv, *starts, AttentionOptions(**options))

    return call


paged_prefill_attention = spelled_out(reference.paged_prefill_attention)
paged_decode_attention = spelled_out(reference.paged_decode_attention)
