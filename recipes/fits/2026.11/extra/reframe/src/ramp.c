/* Write an image of a ramp to the file that is named, read it back, and say the sum of its pixels. */
#include <fitsio.h>
#include <stdio.h>

int main(int argc, char **argv)
{
    enum { WIDTH = 300, HEIGHT = 200 };
    static int written[WIDTH * HEIGHT], read[WIDTH * HEIGHT];
    long size[] = {WIDTH, HEIGHT}, sum = 0;
    int status = 0, any_undefined = 0;
    fitsfile *file;

    if (argc != 2)
        return 2;
    for (int i = 0; i < WIDTH * HEIGHT; i++)
        written[i] = i % WIDTH;
    fits_create_file(&file, argv[1], &status);
    fits_create_img(file, LONG_IMG, 2, size, &status);
    fits_write_img(file, TINT, 1, WIDTH * HEIGHT, written, &status);
    fits_close_file(file, &status);
    fits_open_file(&file, argv[1], READONLY, &status);
    fits_read_img(file, TINT, 1, WIDTH * HEIGHT, NULL, read, &any_undefined, &status);
    fits_close_file(file, &status);
    fits_report_error(stderr, status);
    for (int i = 0; i < WIDTH * HEIGHT; i++)
        sum += read[i];
    printf("sum %ld\n", sum);
    return status != 0;
}
