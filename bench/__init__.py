"""Side-by-side measurements of blockd and qemu-storage-daemon: `make bench`. How: docs/performance.md."""
