/* Preloaded: no file is a terminal, and the kernel is not asked. CPython before 3.14 asks for each file that it opens, and FUSE passes an
 * ioctl(2) on to the server whatever that said before. */
#include <errno.h>

int isatty(int fd)
{
	(void)fd;
	errno = ENOTTY;
	return 0;
}
