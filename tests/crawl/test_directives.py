import pytest

from curation.crawl.directives import opt_out_of


@pytest.mark.parametrize(
    ("values", "tdm", "expected"),
    [
        ([], None, None),
        (["index, follow"], "0", None),
        (["noai"], None, "opt_out_noai"),
        (["index, NoImageAI "], None, "opt_out_noimageai"),
        (["nofollow", "noml"], None, "opt_out_noml"),
        (["noimageai, noai"], None, "opt_out_noai"),
        (["noai;noindex"], None, "opt_out_noai"),
        (["noaiming, xnoai"], None, None),
        (["googlebot: noai"], None, None),
        (["Curation: noai"], None, "opt_out_noai"),
        (["*: noai"], None, "opt_out_noai"),
        (["googlebot: noai, curation : noindex, noml"], None, "opt_out_noml"),
        (["curation: noindex, otherbot: noindex, noai"], None, None),
        (["googlebot: noindex", "noai"], None, "opt_out_noai"),
        (["unavailable_after: Friday, 25-Jun-10 15:00:00 PST, noai"], None, "opt_out_noai"),
        (["max-image-preview: large, noai"], None, "opt_out_noai"),
        ([], " 1 ", "opt_out_tdm"),
        (["noai"], "1", "opt_out_noai"),
        ([":,;:::"], "yes", None),
    ],
)
def test_directives_for_everybody_and_for_us_count(values, tdm, expected):
    assert opt_out_of(values, tdm, "curation") == expected
