"""Exchanges of bytes: framing, parsing, envelopes and negotiation, each in a session of its own."""

from tests.differential.differences import ELEMENTS, ENVELOPES, LIMITS, LONG_VALUES

NEGOTIATE = b'{"execute": "qmp_capabilities"}\n'
OOB = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}\n'

EXCHANGES: list[bytes] = [
    # Before negotiation, and negotiation itself.
    b'{"execute": "query-version"}',
    b'{"execute": "no-such", "id": 1}',
    b'{"execute": 1, "id": 2}',
    b"{]",
    b'{"execute": "qmp_capabilities", "arguments": {"enable": "oob"}}' + NEGOTIATE,
    b'{"execute": "qmp_capabilities", "arguments": {"bogus": 1}, "id": 1}' + NEGOTIATE,
    b'{"execute": "qmp_capabilities", "arguments": {"enable": [1]}, "id": 1}' + NEGOTIATE,
    b'{"exec-oob": "qmp_capabilities"}' + NEGOTIATE,
    NEGOTIATE * 2,
    OOB + OOB,
    NEGOTIATE + b'{"execute": "qmp_capabilities", "arguments": 1}',
    # Envelopes.
    *(
        NEGOTIATE + envelope
        for envelope in [
            b"{}",
            b"[]",
            b"1 ",
            b"null ",
            b'"execute"',
            b'{"id": {"b": [1.5, "x"]}}',
            b'{"execute": null, "id": 3}',
            b'{"execute": ["query-version"]}',
            b'{"execute": "query-version", "arguments": []}',
            b'{"execute": "query-version", "arguments": null, "id": "a"}',
            b'{"execute": "query-version", "extra": 1, "id": "b"}',
            b'{"execute": "no-such", "extra": 1}',
            b'{"exec-oob": "query-version", "id": 4}',
            b'{"execute": "query-version", "exec-oob": "query-version"}',
            b'{"execute": "no-such"}',
            b'{"execute": "no-\\u00e9\\ud83d\\ude00\\u007f\\u0001"}',
            b"{'execute': 'query-version', 'id': 'it\\'s'}",
            b'{"execute": "query-version"}{"execute": "query-jobs"}\r\n\t{"execute": "query-jobs"}',
            b'{"execute": "query-jobs",\n "id":\n 5\n}\n',
        ]
    ),
    OOB + b'{"exec-oob": "query-version", "id": 1}',
    OOB + b'{"exec-oob": "no-such", "id": 1}',
    OOB + b'{"exec-oob": 1, "id": 1}',
    OOB + b'{"exec-oob": "query-version", "execute": "query-version", "id": 1}',
    # Ids come back as they are.
    *(
        NEGOTIATE + b'{"execute": "query-jobs", "id": ' + value + b"}"
        for value in [
            b"null",
            b"false",
            b"[]",
            b"{}",
            b"-0",
            b"-0.0",
            b"0.1",
            b"1e3",
            b"1.5e300",
            b"5e-324",
            b"9223372036854775807",
            b"18446744073709551615",
            b"18446744073709551616",
            b"-9223372036854775809",
            b'"\\u0000\\u001f\\u007f\\"\\\\\\/\\b\\f\\n\\r\\t"',
            b'"\xc0\x80\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"',
            b"[" * 1000 + b"]" * 1000,
        ]
    ),
    # Arguments.
    *(
        NEGOTIATE + b'{"execute": ' + command + b"}"
        for command in [
            b'"block-job-set-speed"',
            b'"block-job-set-speed", "arguments": {"device": "d"}',
            b'"block-job-set-speed", "arguments": {"device": "d", "speed": "1"}',
            b'"block-job-set-speed", "arguments": {"device": "d", "speed": true}',
            b'"block-job-set-speed", "arguments": {"device": "d", "speed": 1.0}',
            b'"block-job-set-speed", "arguments": {"device": "d", "speed": [1]}',
            b'"block-job-set-speed", "arguments": {"device": "d", "speed": {}}',
            b'"block-job-set-speed", "arguments": {"device": "d", "speed": null}',
            b'"block-job-set-speed", "arguments": {"device": "d", "speed": 9223372036854775808}',
            b'"block-job-set-speed", "arguments": {"device": 1, "speed": "x"}',
            b'"block-job-set-speed", "arguments": {"device": "d", "speed": 1, "bogus": 1}',
            b'"block-job-set-speed", "arguments": {"device": "d", "speed": 1}',
            b'"block-job-cancel", "arguments": {"device": "d", "force": 1}',
            b'"block-job-cancel", "arguments": {"device": "\\u00e9"}',
            b'"job-pause", "arguments": {"id": "j"}, "id": 1',
            b'"job-pause", "arguments": {"id": null}',
            b'"query-jobs", "arguments": {"x": 1}',
        ]
    ),
    # The parser: errors, and where it goes on.
    *(
        NEGOTIATE + data
        for data in [
            b"{]",
            b"}",
            b"]:,",
            b'{"execute": }',
            b'{"execute"}',
            b'{"a" 1}',
            b"{1:2}",
            b"{[1]:2}",
            b"{[1 2]:3}",
            b'{"a":1 "b":2}',
            b"[1 2]",
            b"[1 2, {]]",
            b"[1,]",
            b'{"a":1,}',
            b'{"a":1,"a":2}',
            b"tru ",
            b"nul\n",
            b"01 ",
            b"+1\n",
            b"1.\n",
            b"-\n",
            b"1e}",
            b"0e1 ",
            b"NaN\n",
            b'"\\q"',
            b'"\\u12"',
            b'"\\ud800"',
            b'"\\ud800\\u0041"',
            b'"\\uffff"',
            b'"\xed\xa0\x80"',
            b'"\xef\xbf\xbe"',
            b'"\xc1\x81 \\q"',
            b"{\xff",
            b"{\x01",
            b"\xef\xbb\xbf{'execute': 'query-jobs'}",
            b"\xf0\x9f\x98\x80 {'execute': 'query-jobs'}",
            b'"abc\ndef" {"execute": "query-jobs"}',
            b"% 1 2 \t 3 \n 4 ",
            b"'\xc3\x28\x80\xfe",
            b"x" * 1500 + b" ",
            b"[" * 1024 + b"]" * 1024,
            b"[" * 1025,
            b'{"a":' * 1024 + b"[",
            b'"' + b"x" * 100_000 + b'"',
            b'"' + b"\\u00e9" * 10_000 + b'\\q"',
            b'{"execute": "query-jobs", "id": "' + b"\\ud83d\\ude00\xc3\xa9" * 10_000 + b'"}',
        ]
    ),
]


# What is answered otherwise on purpose: the exchange, and the entry of the document.
DIFFERENT: list[tuple[bytes, str]] = [
    (NEGOTIATE + b"[" * 1025 + b"]" * 1025, LIMITS),
    (NEGOTIATE + b'{"a":' * 1024 + b"[1]" + b"}" * 1024, LIMITS),
    (NEGOTIATE + b'{"b": 1, "a": 1}', ENVELOPES),
    (NEGOTIATE + b'{"execute": "job-pause", "arguments": {"id": "' + b"x" * 1_100_000 + b'"}}', LONG_VALUES),
    (b'{"execute": "qmp_capabilities", "arguments": {"enable": ["zap"]}}' + NEGOTIATE, ELEMENTS),
]
