"""The NBD protocol as bytes: fixed newstyle haggling, requests, simple and structured replies.

Both directions of everything are here, so that server and client are built on the same words and
each can be tested against the other. Nothing here reads, writes or waits.

Source:   the NetworkBlockDevice project's doc/proto.md.
"""
