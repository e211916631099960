! Read the first image of the file that is named, and say the sum of its pixels.
program ramp
  implicit none
  integer, parameter :: width = 300, height = 200
  integer :: unit, status
  integer :: pixels(width * height)
  logical :: any_undefined
  character(len=256) :: name

  call get_command_argument(1, name)
  status = 0
  call ftgiou(unit, status)
  call ftiopn(unit, trim(name), 0, status)
  call ftgpvj(unit, 1, 1, width * height, 0, pixels, any_undefined, status)
  call ftclos(unit, status)
  if (status /= 0) error stop "cannot read the image"
  print '(A,I0)', "sum ", sum(pixels)
end program
