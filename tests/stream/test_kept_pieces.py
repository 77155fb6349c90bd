"""What is kept of clusters, by itself: pieces are joined, counted and found."""

from blockd.filters.kept_parts import PIECE_COST, KeptCluster, KeptParts


def test_pieces_are_joined_and_the_newest_is_on_top() -> None:
    cluster = KeptCluster(100)
    for offset, data in [(110, b"aaaa"), (120, b"bb"), (112, b"cccc"), (116, b"dddd"), (121, b"e")]:
        cluster.put(offset, data)
    assert list(cluster.pieces(0, 1000)) == [(110, b"aaccccddddbe")]
    assert list(cluster.pieces(111, 114)) == [(111, b"acc")]
    assert cluster.cost == 12 + PIECE_COST
    cluster.put(100, b"f" * 10)
    assert cluster.covers(122)
    assert not cluster.covers(123)


def test_what_is_kept_is_counted_and_found() -> None:
    kept = KeptParts(128)
    for offset in (10, 130, 180, 390):
        kept.put(offset, b"x" * 20)
    assert kept.runs(1000) == [(0, 256), (384, 512)]
    assert kept.runs(128) == [(0, 128), (128, 256), (384, 512)]
    ranges = [(0, 1), (256, 384), (250, 257), (300, 385), (511, 512), (512, 9999)]
    assert [kept.touches(*each) for each in ranges] == [True, False, True, True, True, False]
    assert [offset for offset, _ in kept.pieces(20, 380)] == [20, 130, 180, 390]
    assert kept._cost == 4 * (20 + PIECE_COST)
    kept.drop(128, 256)
    assert kept._cost == 2 * (20 + PIECE_COST)
    kept.drop(0, 10**12)
    assert not kept
    assert kept._cost == 0
