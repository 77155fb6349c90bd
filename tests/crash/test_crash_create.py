"""A crash while an image is made leaves no image, or all of it."""

from tests.crash.creation import sweep_creation


async def test_crash_while_creating_leaves_no_image_or_all_of_it() -> None:
    await sweep_creation()
