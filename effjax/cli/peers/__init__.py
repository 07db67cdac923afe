"""Systems that decode one model beside each other, each in processes of its own.

What imports a system stands in a file that only its own process imports: effjax itself
needs none of them.
"""
