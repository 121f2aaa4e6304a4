# Fails when an object compiled for an instruction set of its own has a weak symbol: the linker keeps
# one copy of a weak function, perhaps the one with instructions that this CPU lacks.
#
#   cmake -DNM=<nm> -DOBJECTS=<list> -P no_weak_symbols.cmake
set(checked 0)
foreach(object ${OBJECTS})
  if(object MATCHES "_(avx2|avx512|amx|neon)\\.cc")
    math(EXPR checked "${checked} + 1")
    execute_process(COMMAND ${NM} ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCHALL "[0-9a-f]+ [WVu] [^\n]+" weak "${symbols}")
    if(weak)
      message(SEND_ERROR "${object} has weak symbols: ${weak}")
    endif()
  endif()
endforeach()
if(checked EQUAL 0)
  message(SEND_ERROR "no object of an instruction set was found among: ${OBJECTS}")
endif()
