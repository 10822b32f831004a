from host import request
def test_a(spawn):
    h = spawn()
    print(h.wait_ready())
    print(h.ask(request(["a","b"])))
    print(h.engine_pids(), h.group_pids())
    h.close_stdin()
    assert h.wait_exit()==0
    print(h.errors)
def test_k(spawn):
    h = spawn(keeper=True)
    print(h.wait_ready())
    print(h.ask(request(["a","b"])), h.pid, h.group_pids())
    h.kill_keeper()
    h.wait_exit(1.5)
    print(h.errors)
def test_s(spawn):
    h = spawn(stdin="socketpair",stdout="socketpair",setup="signal.pthread_sigmask(signal.SIG_BLOCK, range(1,65))")
    h.wait_ready()
    h.close_stdin()
    assert h.wait_exit()==0
