"""The app process: the page, the chats on disk, and the guard in front of them. Never torch."""
