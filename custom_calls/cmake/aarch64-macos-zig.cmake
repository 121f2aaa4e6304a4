# For macOS on Apple silicon from any machine: zig's C++ compiler needs no Apple SDK.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
find_program(zig zig REQUIRED)
set(CMAKE_CXX_COMPILER "${zig}" c++)
set(CMAKE_CXX_COMPILER_TARGET aarch64-macos.13.0)
# Of Apple's own tools none is needed: nothing is installed from such a build.
set(CMAKE_INSTALL_NAME_TOOL true)
